"""The trainer nodes on the headless host: the embedded model, a reward, a job that is looked at and collected."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft")

from retort.files.atomic import locked  # noqa: E402
from retort.hosts import api
from retort.hosts.jobs import starter
from retort.hosts.jobs.process import run_job  # noqa: E402
from retort.hosts.rewards import kinds as rewards
from retort.hosts.training import run as training  # noqa: E402
from retort.nodes import jobs  # noqa: E402
from retort.nodes import training as training_nodes  # noqa: E402
from retort.nodes.training import (  # noqa: E402
    RetortFewShotAdapt,
    RetortTrainDistillation,
    RetortTrainFlow,
    one,
)
from retort.rewards.combine import Combined, Term  # noqa: E402
from retort.trainers import job_watch, state  # noqa: E402
from retort.trainers.job import LOCK  # noqa: E402
from retort.trainers.methods import read_config  # noqa: E402
from retort.trainers.watch import METRICS, read_metrics  # noqa: E402

PROMPTS = "a bold blue seven\na thin red two"
QUICK = {"steps": 2, "batch_size": 1, "rank": 2, "warmup": 0, "learning_rate": 0.01, "preview_every": 0, "seed": 3}


@pytest.fixture
def run(where):
    """run(node, method, chosen, **inputs) -> what it gives; chosen: the method's settings. The rest has its default."""
    model, clip, vae = api.host.embedded("flow")

    def execute(node, method="", chosen=(), **given):
        inputs = node.define_schema().inputs
        values = {i.id: i.default for i in inputs if getattr(i, "default", None) is not None}
        if method:
            choices = next(i for i in inputs if i.id == "method").options
            settings = next(option for option in choices if option.key == method).inputs
            values["method"] = {"method": method, **{i.id: i.default for i in settings}, **dict(chosen)}
        values |= {**QUICK, "model": model, "clip": clip, "vae": vae, "prompts": PROMPTS, **given}
        values |= {"latents": given.get("latents", {"samples": torch.zeros(1, 16, 8, 8)})}
        done = node.execute(**{k: v if isinstance(v, list) else [v] for k, v in values.items() if v is not None})
        execute.shown = done.ui
        return done.args

    execute.clip = clip
    return execute


def judge():
    return rewards.make(api.host, "embedded_judge", {"boldness": 1.0})


def test_a_reward_has_a_part_in_what_is_learnt(run, where):
    chosen = {"ratio": 1, "alpha_rew": 5.0}
    lora, loss, file, name = run(RetortTrainDistillation, "di_star", chosen, reward=judge(), name="pleased")
    assert len(loss["loss"]) == 2 and (file, name) == ("pleased.safetensors", "pleased")
    rows = read_metrics(where.output / "retort" / "pleased" / METRICS)
    assert all(isinstance(row["reward"], float) for row in rows)
    with pytest.raises(ValueError, match="name: the run .* was started with another reward"):
        run(RetortTrainDistillation, "di_star", chosen, reward=Combined((Term(judge()),)), name="pleased")
    plain = run(RetortTrainDistillation, "di_star", {"ratio": 1}, name="plain")[0]
    assert any(not torch.equal(lora[k], plain[k]) for k in plain)


def test_a_fake_score_for_each_step_is_saved_and_goes_on(run, where):
    """Players that rest while others move: each has its own optimiser, and the run is the uninterrupted one."""
    chosen = {"steps": 2, "conditioned": True, "diffusing": "top"}
    whole = run(RetortTrainDistillation, "tdm", chosen, name="whole", steps=6)[0]
    run(RetortTrainDistillation, "tdm", chosen, name="parts", steps=2)
    assert all(
        torch.equal(v, whole[k])
        for k, v in run(RetortTrainDistillation, "tdm", chosen, name="parts", steps=6)[0].items()
    )
    groups = state.load(where.output / "retort" / "parts" / "state.safetensors", None)[0]
    assert {"weights fake_2_0", "weights fake_2_1", "optimiser fake_2_0", "optimiser fake_2_1"} <= set(groups)
    assert all("fake_loss" in row for row in read_metrics(where.output / "retort" / "parts" / METRICS))


def test_captions_that_are_connected_come_one_for_each_picture(run, where, monkeypatch):
    """Each picture has its own; one that is empty stays empty, and too few are no captions of others."""
    asked = []
    result = training.Result({}, [0.5], where.models[0] / "loras" / "x.safetensors", where.output / "retort" / "x", 2)
    monkeypatch.setattr(training, "run_in_node", lambda host, model, request, **_: asked.append(request) or result)
    given = {"latents": None, "images": [torch.full((1, 64, 64, 3), i / 4) for i in range(3)]}
    captions = ["a bold blue seven", " ", "a thin\nred two"]
    run(RetortTrainFlow, **given, prompts=captions, name="each")
    data = asked[0].dataset
    assert data.prompts == ["a bold blue seven", "", "a thin red two"] and len(data.entries) == len(data.latents) == 3
    for entry, text in zip(data.entries, data.prompts, strict=True):
        assert torch.equal(entry[0], run.clip.encode(text)[0][0])
    with pytest.raises(ValueError, match="3 latents and 2 prompts: give each image its caption"):
        run(RetortTrainFlow, **given, prompts=captions[:2], name="few")
    with pytest.raises(ValueError, match="there are no prompts"):
        run(RetortTrainFlow, **given, prompts=["", " ", ""], name="none")


def test_a_reward_that_cannot_be_used_is_refused(run, where):
    positive = [run.clip.encode("a red two")]
    for given, message in (
        ({"method": "dmd2"}, "reward: dmd2 pleases none; choose one of di_star"),
        ({"method": "di_star", "vae": None}, "looks at pictures: connect `vae`"),
        ({"method": "di_star", "prompts": "", "positive": positive}, "reads prompts.*type them in `prompts`"),
    ):
        with pytest.raises(ValueError, match=message):
            run(RetortTrainDistillation, reward=judge(), **given)
    with pytest.raises(ValueError, match=r"alpha_rew is 5\.0, and a job takes no reward: set it to 0"):
        run(jobs.RetortTrainingJob, "di_star", {"alpha_rew": 5.0})
    assert not list((where.output / "retort").glob("*"))
    with pytest.raises(ValueError, match="there is no reward: connect a differentiable one"):
        run(RetortTrainDistillation, "di_star", {"alpha_rew": 5.0})


@pytest.mark.parametrize("node", [RetortTrainFlow, RetortFewShotAdapt])
def test_images_are_learnt_and_metadata_tells_of_it(run, where, node):
    given = {"images": [torch.rand(2, 64, 64, 3)], "latents": [], "name": "style", "steps": 3}
    lora, loss, file, _ = run(node, **given)
    assert len(loss["loss"]) == 3 and lora
    path = where.models[0] / "loras" / file
    assert load_file(path).keys() == lora.keys()
    from safetensors import safe_open

    with safe_open(path, "pt") as handle:
        notes = handle.metadata()
    assert notes["retort.method"] in ("flow", "few_shot") and notes["retort.steps"] == notes["ss_steps"] == "3"
    assert notes["ss_network_dim"] == "2" and '"learning_rate": 0.01' in notes["retort.config"]
    assert len(notes["retort.base_hash"]) == 16 and notes["retort.version"] and notes["modelspec.title"] == "style"
    assert notes["modelspec.architecture"].endswith("/lora")


def in_use():
    raise PermissionError(13, "it is in use")


def test_more_steps_take_the_place_of_the_lora_which_keeps_its_steps_in_its_name(run, where, monkeypatch):
    loras = where.models[0] / "loras"
    given = {"images": [torch.rand(2, 64, 64, 3)], "latents": [], "name": "longer"}
    run(RetortTrainFlow, **given, steps=2)
    first = (loras / "longer.safetensors").read_bytes()
    assert run(RetortTrainFlow, **given, steps=3)[2] == "longer.safetensors"
    assert (loras / "longer_step_2.safetensors").read_bytes() == first
    second = (loras / "longer.safetensors").read_bytes()
    assert second != first
    # One that is in use, as Windows has it, stays; what was trained is not lost for it.
    plain = Path.unlink
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", lambda path, *_, **__: in_use() if path.stem == "longer" else plain(path))
        assert training.set_aside(api.host.runs_folder() / "longer", loras, "longer") is None
    assert {path.stem for path in loras.iterdir()} == {"longer", "longer_step_2"}
    # A file that is not as the run left it is somebody's own: it stays.
    (loras / "longer.safetensors").write_bytes(first)
    assert run(RetortTrainFlow, **given, steps=4)[2] == "longer_2.safetensors"
    assert (loras / "longer.safetensors").read_bytes() == first
    assert {path.stem for path in loras.iterdir()} == {"longer", "longer_2", "longer_step_2"}


def test_a_loss_that_has_exploded_is_said(run, where, monkeypatch):
    shown = []
    for name, last in (("fine", 2.0), ("wild", 3e15)):
        losses = [0.5] * 15 + [last] * 15
        path = where.models[0] / "loras" / f"{name}.safetensors"
        result = training.Result({}, losses, path, where.output / "retort" / name, 30)
        monkeypatch.setattr(training, "run_in_node", lambda *_, result=result, **__: result)
        request = training.Request(name, read_config({"method": "flow"}), None)
        shown.append(training_nodes.run(RetortTrainFlow, None, request, None).ui["text"])
    said = "the loss has grown from 0.5 to 3e+15: lower learning_rate, under another name"
    assert shown == [("fine.safetensors, 30 steps",), ("wild.safetensors, 30 steps", said)]


def test_a_job_is_started_looked_at_and_collected(run, where, monkeypatch):
    started = []
    monkeypatch.setattr(starter, "start", lambda folder, arguments, processes: started.append((folder, processes)))
    monkeypatch.setattr(jobs, "read_status", lambda folder: job_watch.Status("queued"))
    assert run(jobs.RetortTrainingJob, "tdm", name="job", steps=6, save_every=2)[0] == "job"
    # Before its first checkpoint there is nothing to hand on: what needs the LoRA is left out, and nothing fails.
    *parts, text, name = jobs.RetortCollectJob.execute("job", wait=False).args
    assert [part for part in parts if not isinstance(part, api.ExecutionBlocker)] == [""]
    assert isinstance(name, api.ExecutionBlocker) and "press Run again later" in text
    monkeypatch.undo()
    folder = where.output / "retort" / "job"
    assert started == [(folder, 1)]

    class Stops(job_watch.Silent):
        def commands(self):
            return {"stop"} if read_metrics(folder / METRICS) else set()

    assert run_job(api.host, folder, Stops()).state == "stopped"
    lora, loss, file, picture, status, name = jobs.RetortCollectJob.execute("job").args
    assert status.startswith("job: stopped") and file == "" and lora and picture.shape[-1] == 3
    assert run_job(api.host, folder).state == "finished"
    lora, loss, file, picture, status, name = jobs.RetortCollectJob.execute("job").args
    assert (file, name, len(loss["loss"])) == ("job.safetensors", "job", 6) and "finished, step 6 of 6" in status
    assert lora.keys() == load_file(where.models[0] / "loras" / file).keys()
    assert jobs.RetortLossChart.execute("job").args[0].shape[-1] == 3
    # Told something when it is over, it hears nothing; one that failed says why, with the end of its log.
    jobs.RetortCollectJob.execute("job", command="stop")
    assert not (folder / job_watch.COMMANDS_FOLDER / "stop").exists()
    (folder / "job.log").write_text("the last line")
    job_watch.write_status(folder, job_watch.Status("failed", message="no luck", pid=os.getpid()))
    with pytest.raises(ValueError, match=r"run 'job' failed.*no luck\nthe last line"):
        jobs.RetortCollectJob.execute("job")


def test_runs_that_are_not_there_are_named(where):
    for node in (jobs.RetortCollectJob, jobs.RetortLossChart):
        with pytest.raises(ValueError, match="there is no run called 'none'"):
            node.execute("none")
        with pytest.raises(ValueError, match="cannot be a file's name"):
            node.execute("../none")


def test_lists_of_one_are_single_values():
    assert one([{"a": [1], "b": {"c": ["x"]}}]) == {"a": [1], "b": {"c": ["x"]}}
    assert one({"a": [1], "b": {"c": ["x"]}}) == {"a": 1, "b": {"c": "x"}} and one(3) == 3


def test_a_run_in_a_node_tells_how_far_it_is_and_hears_commands(run, where, monkeypatch):
    """As a job's process does, so that the page shows and steers both alike."""
    folder = where.output / "retort" / "told"
    seen = []

    class Page(training.HostWatcher):
        def step(self, done, total, metrics):
            super().step(done, total, metrics)
            status = job_watch.read_status(folder)
            seen.append((status.state, status.going))
            if done == 1:
                job_watch.send(folder, "save")
                job_watch.send(folder, "sample")
            if done == 3:
                job_watch.send(folder, "stop")
            # Commands are looked for now and then.
            time.sleep(job_watch.LOOK_EVERY)

    monkeypatch.setattr(training, "HostWatcher", Page)
    before = RetortTrainDistillation.fingerprint_inputs(name=["told"])
    # A stop hands out the LoRA so far under a name of its own, and the node runs again when it is queued again.
    lora, loss, file, name = run(RetortTrainDistillation, "tdm", {"steps": 1}, name="told", steps=9)
    assert (file, name, len(loss["loss"])) == ("told_step_3.safetensors", "told", 3) and lora
    assert load_file(where.models[0] / "loras" / file).keys() == lora.keys()
    for given in (["told"], (None,)):
        assert RetortTrainDistillation.fingerprint_inputs(name=given) != before
    assert RetortTrainDistillation.fingerprint_inputs(name=["other"]) == 0
    status = job_watch.read_status(folder)
    assert (status.state, status.step, status.lora) == ("stopped", 3, file) and seen[0] == ("running", True)
    assert status.message == "run it again to go on"
    assert [path.name for path in (folder / "checkpoints").iterdir()][0] == "step_0000001.safetensors"
    assert (folder / "previews" / "step_0000001.png").is_file()
    monkeypatch.undo()
    lora = run(RetortTrainDistillation, "tdm", {"steps": 1}, name="told", steps=4)[2]
    status = job_watch.read_status(folder)
    assert (status.state, status.step, status.lora) == ("finished", 4, lora)
    result = json.loads((folder / "result.json").read_text())
    assert result["timesteps"] == [1000.0] and result["base"] == {"kind": "embedded", "variant": "flow"}
    assert (result["prompt"], result["latent"], result["size"]) == ("a bold blue seven", [16, 8, 8], [64, 64])
    assert lora == "told.safetensors"


def test_a_run_that_is_stopped_before_it_has_learnt_ends_the_node(run, where, monkeypatch):
    """Nothing that it could hand out would change a picture."""
    monkeypatch.setattr(training.HostWatcher, "commands", lambda self: {"stop"})
    with pytest.raises(api.host.CANCELLED):
        run(RetortTrainDistillation, "tdm", {"steps": 1}, name="early", steps=9, learning_rate=0.0)
    status = job_watch.read_status(where.output / "retort" / "early")
    assert (status.state, status.step, status.lora) == ("stopped", 1, "")
    assert not list((where.models[0] / "loras").iterdir())


def test_a_run_that_fails_says_so_and_a_job_keeps_a_node_out(run, where, monkeypatch):
    def broken(*_):
        raise RuntimeError("the roof is on fire")

    run(RetortTrainDistillation, "tdm", {"steps": 1}, name="told", steps=1)
    monkeypatch.setattr(training.HostWatcher, "step", broken)
    with pytest.raises(RuntimeError, match="roof"):
        run(RetortTrainDistillation, "tdm", {"steps": 1}, name="told", steps=2)
    folder = where.output / "retort" / "told"
    status = job_watch.read_status(folder)
    assert status.state == "failed" and status.message == "RuntimeError: the roof is on fire"
    with locked(folder, LOCK), pytest.raises(BlockingIOError, match="belongs to a run that is still going"):
        run(RetortTrainDistillation, "tdm", {"steps": 1}, name="told", steps=2)


def test_fewer_steps_than_a_run_has_done_train_nothing_and_it_says_so(run, where):
    first = run(RetortTrainDistillation, "dmd2", {"ratio": 1}, name="done", steps=3)
    again = run(RetortTrainDistillation, "dmd2", {"ratio": 1}, name="done", steps=2)
    assert again[2] == first[2] and all(torch.equal(v, first[0][k]) for k, v in again[0].items())
    status = job_watch.read_status(where.output / "retort" / "done")
    assert (status.state, status.lora, status.message) == ("finished", first[2], "")
    said = "it had done 3 steps before, so that steps = 2 trains nothing: another name begins anew"
    assert said in run.shown["text"]
    run(RetortTrainDistillation, "dmd2", {"ratio": 1}, name="done", steps=3)
    assert len(run.shown["text"]) == 1


def test_a_refused_or_stopped_request_leaves_what_a_finished_run_shows(run, where, monkeypatch):
    """Its LoRA is in the folder still, so the page must go on offering it."""
    lora = run(RetortTrainDistillation, "tdm", {"steps": 1}, name="kept", steps=2)[2]
    folder = where.output / "retort" / "kept"
    # Other settings are refused before anything is touched, other data once they are encoded.
    for change, message, noted in (
        ({"rank": 4}, "lora.rank", ""), ({"prompts": "a green four"}, "other prompts", "last request refused: "),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run(RetortTrainDistillation, "tdm", {"steps": 1}, **{"name": "kept", "steps": 2, **change})
        status = job_watch.read_status(folder)
        assert (status.state, status.step, status.steps, status.lora) == ("finished", 2, 2, lora)
        assert status.message.startswith(noted) and (message in status.message) == bool(noted)

    def cancelled(*_):
        raise api.host.CANCELLED()

    monkeypatch.setattr(training.HostWatcher, "check", cancelled)
    with pytest.raises(api.host.CANCELLED):
        run(RetortTrainDistillation, "tdm", {"steps": 1}, name="kept", steps=9)
    status = job_watch.read_status(folder)
    assert (status.state, status.step, status.lora) == ("finished", 2, lora)
    assert status.message == "the last request was stopped before its first step"
    monkeypatch.setattr(training.HostWatcher, "check", lambda self: self._done < 3 or cancelled())
    with pytest.raises(api.host.CANCELLED):
        run(RetortTrainDistillation, "tdm", {"steps": 1}, name="kept", steps=9)
    status = job_watch.read_status(folder)
    assert (status.state, status.step, status.steps, status.lora) == ("stopped", 3, 9, lora)
    monkeypatch.undo()
    run(RetortTrainDistillation, "tdm", {"steps": 1}, name="kept", steps=9)
    assert (job_watch.read_status(folder).state, job_watch.read_status(folder).message) == ("finished", "")


def test_an_expert_is_a_setting_of_methods_that_draw_levels_and_stands_last():
    """Saved workflows know widgets by their place: those of a method stay as they were."""
    from retort.nodes.checks import Asked
    from retort.nodes.jobs import RetortTrainingJob
    from retort.nodes.preference import RetortTrainPreference
    from retort.nodes.training import RetortTrainFlow, config_of
    from retort.trainers.methods import METHODS

    for node in (RetortTrainFlow, RetortTrainPreference, RetortTrainingJob):
        widgets = [one.id for one in node.define_schema().inputs if one.get_io_type() in ("COMBO", "FLOAT", "STRING")]
        assert widgets[-4:] == ["offload", "sound_weight", "expert", "boundary"]
    given = {"method": {"method": "dpo"}, "expert": "low noise", "boundary": 0.9}
    made = config_of(Asked(given)).objective
    assert (made.expert, made.boundary) == ("low noise", 0.9) and METHODS["dpo"].config().expert == "whole"
    with pytest.raises(ValueError, match="expert 'low noise': tdm trains a network on all its levels"):
        config_of(Asked({**given, "method": {"method": "tdm"}}))
    assert config_of(Asked({**given, "method": {"method": "tdm"}, "expert": "whole"})).method == "tdm"
