"""Train Restorer on the headless host: both twins, feature losses, going on, a job, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("sklearn")

from retort.hosts import api
from retort.hosts.jobs import starter  # noqa: E402
from retort.hosts.jobs.process import run_job  # noqa: E402
from retort.models import digits  # noqa: E402
from retort.nodes import jobs  # noqa: E402
from retort.nodes.train_restorer import RetortTrainRestorer  # noqa: E402
from retort.trainers import job_watch  # noqa: E402
from retort.trainers.watch import METRICS, read_metrics  # noqa: E402

QUICK = {"steps": 4, "batch_size": 2, "rank": 2, "warmup": 0, "learning_rate": 0.01, "preview_every": 0, "seed": 3,
         "regression_steps": 2}  # fmt: skip


@pytest.fixture(scope="module")
def drawn():
    fields, labels = digits.load("train")
    found = digits.draw(fields[:4], labels[:4], torch.Generator().manual_seed(4))
    return found.image.movedim(1, -1), "\n".join(found.caption(i) for i in range(4))


def values_of(node, **given):
    return {i.id: i.default for i in node.define_schema().inputs if hasattr(i, "default")} | given


def run(drawn, variant="flow", **given):
    model, clip, vae = api.host.embedded(variant)
    values = values_of(RetortTrainRestorer, **QUICK, model=model, clip=clip, vae=vae, images=drawn[0], prompts=drawn[1])
    return RetortTrainRestorer.execute(**{k: [v] for k, v in (values | given).items() if v is not None}).args


@pytest.mark.parametrize("variant", ["flow", "eps"])
def test_it_trains_a_lora_by_regression_and_then_by_matching(where, drawn, variant):
    lora, loss, file, name = run(drawn, variant, name="mine")
    assert lora and len(loss["loss"]) >= 3 and (file, name) == ("mine.safetensors", "mine")
    rows = read_metrics(where.output / "retort" / "mine" / METRICS)
    assert [("score_loss" in row, "matching_norm" in row) for row in rows] == [(False, False)] * 2 + [(True, True)] * 2
    assert all(row["input_distance"] > 0 for row in rows)


def test_damage_is_drawn_by_the_step_so_a_stopped_run_goes_on_as_it_would_have(where, drawn):
    whole = run(drawn, name="whole")[0]
    run(drawn, name="split", steps=2)
    split = run(drawn, name="split", steps=4)[0]
    assert all(torch.equal(whole[key], split[key]) for key in whole)


def test_the_feature_loss_looks_with_the_judge_and_changes_what_is_learnt(where, drawn):
    plain = run(drawn, name="plain", steps=2)[0]
    looked = run(drawn, name="looked", steps=2, feature_weight=1.0, features="judge")[0]
    assert any(not torch.equal(plain[key], looked[key]) for key in plain)
    rows = read_metrics(where.output / "retort" / "looked" / METRICS)
    assert all(row["feature_distance"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vae": None}, "images are encoded by a VAE: connect `vae`"),
        ({"images": None}, "a restorer learns from pictures, .*connect `images` and `vae`"),
        ({"feature_weight": 1.0, "features": "vgg16"}, "torchvision's VGG16 'vgg16.safetensors' is not in"),
        ({"weakest": 0.9, "strongest": 0.1}, "strongest must be no smaller"),
        ({"matching_weight": 0.0, "regression_weight": 0.0}, "nothing would be learnt"),
        ({"prompts": "a\nb\nc"}, "4 latents and 3 prompts"),
    ],
)
def test_what_cannot_be_is_said(where, drawn, given, message):
    with pytest.raises(ValueError, match=message):
        run(drawn, **given)


def test_a_job_trains_it_in_a_process_of_its_own(where, drawn, monkeypatch):
    started = []
    monkeypatch.setattr(starter, "start", lambda folder, arguments, processes: started.append(folder))
    monkeypatch.setattr(jobs, "read_status", lambda folder: job_watch.Status("queued"))
    model, clip, vae = api.host.embedded("flow")
    method = {"method": "instarevive", "regression_steps": 2}
    settings = {k: v for k, v in QUICK.items() if k != "regression_steps"}
    given = {"model": model, "clip": clip, "vae": vae, "images": drawn[0], "prompts": drawn[1], "name": "job",
             "method": method}  # fmt: skip
    values = values_of(jobs.RetortTrainingJob, **settings, **given)
    jobs.RetortTrainingJob.execute(**{k: [v] for k, v in values.items() if v is not None})
    monkeypatch.undo()
    assert run_job(api.host, started[0]).state == "finished"
    assert json.loads((started[0] / "config.json").read_text())["method"] == "instarevive"
    in_node = run(drawn, name="node")[0]
    from_job = jobs.RetortCollectJob.execute("job").args[0]
    assert all(torch.equal(in_node[key], from_job[key]) for key in in_node)
