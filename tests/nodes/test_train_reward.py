"""Train Reward on the headless host: each method on both embedded twins, two rewards, and what it refuses."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")

from retort.hosts import api
from retort.hosts.rewards import kinds as rewards  # noqa: E402
from retort.nodes import jobs  # noqa: E402
from retort.nodes.train_reward import RetortTrainReward  # noqa: E402
from retort.trainers.methods import read_config  # noqa: E402
from retort.trainers.watch import METRICS, read_metrics  # noqa: E402

QUICK = {"steps": 2, "batch_size": 1, "rank": 2, "warmup": 0, "learning_rate": 0.01, "preview_every": 0, "seed": 3}
SHORT = {
    "align_prop": {"steps": 4},
    "spo": {"steps": 4, "candidates": 2, "trained": 1},
    "flow_grpo": {"steps": 3, "group": 2},
}


def reward(kind="embedded_judge", **settings):
    return rewards.make(api.host, kind, {"boldness": 1.0} if kind == "embedded_judge" else settings)


def run(method, variant="flow", chosen=(), **given):
    model, clip, vae = api.host.embedded(variant)
    values = {"method": {"method": method, **SHORT[method], **dict(chosen)}}
    values |= {**QUICK, "model": model, "clip": clip, "vae": vae, "prompts": "a bold blue seven\na thin red two"}
    values |= {"latents": {"samples": torch.zeros(1, 16, 8, 8)}, "reward": reward(), **given}
    return RetortTrainReward.execute(**{k: [v] for k, v in values.items() if v is not None}).args


@pytest.mark.parametrize(
    ("method", "variant"),
    [("align_prop", "flow"), ("align_prop", "eps"), ("spo", "flow"), ("spo", "eps"), ("flow_grpo", "flow")],
)
def test_each_method_trains_a_lora(where, method, variant):
    lora, loss, file, name = run(method, variant, name="taste")
    assert lora and len(loss["loss"]) == 2 and (file, name) == ("taste.safetensors", "taste")
    rows = read_metrics(where.output / "retort" / "taste" / METRICS)
    assert all(isinstance(row["reward"], float) for row in rows)
    # A reward without a gradient serves as well where the method asks for none.
    if method == "spo" and variant == "flow":
        assert run(method, variant, name="small", reward=reward("jpeg", prefer="small", quality=95))[0]


def test_a_run_that_was_stopped_between_two_policies_goes_on_as_it_would_have(where):
    whole = run("flow_grpo", name="whole", steps=2)[0]
    run("flow_grpo", name="parts", steps=1)
    parts = run("flow_grpo", name="parts", steps=2)[0]
    assert all(torch.equal(v, parts[k]) for k, v in whole.items())


def test_two_rewards_are_balanced(where):
    run("align_prop", name="both", reward_2=reward("sharpness"))
    rows = read_metrics(where.output / "retort" / "both" / METRICS)
    assert all(0 <= row["share"] <= 1 and isinstance(row["reward_2"], float) for row in rows)
    with pytest.raises(ValueError, match="reward_2: spo takes one reward; join both with Combine Rewards"):
        run("spo", reward_2=reward())


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("align_prop", {"reward": "jpeg"}, "has no gradient, and align_prop needs a differentiable one"),
        ("align_prop", {"reward_2": "jpeg"}, "has no gradient, and align_prop needs a differentiable one"),
        ("align_prop", {"prompts": ""}, "there are no prompts"),
        ("spo", {"vae": None}, "looks at pictures: connect `vae`"),
        ("spo", {"reward": None}, "learns from a reward, and there is none: connect `reward`"),
        ("flow_grpo", {"variant": "eps"}, "predicts eps: choose spo or align_prop"),
        ("spo", {"variant": "eps", "chosen": {"step": "sde"}}, "choose 'ancestral'"),
        ("align_prop", {"chosen": {"last": 9}}, "last must be at most 4, got 9"),
    ],
)
def test_what_cannot_be_is_said(where, method, given, message):
    given = {k: reward(v, prefer="small", quality=95) if v == "jpeg" else v for k, v in given.items()}
    with pytest.raises(ValueError, match=message):
        run(method, **given)


def test_prompts_must_be_readable(where):
    clip = api.host.embedded("flow")[1]
    with pytest.raises(ValueError, match="reads prompts"):
        run("spo", prompts="", positive=clip.encode("a red two"))


def test_jobs_take_no_reward(where):
    from retort.trainers.job import Job
    from retort.trainers.sources import read_base

    base = read_base({"kind": "embedded", "variant": "flow"})
    with pytest.raises(ValueError, match="learns from a reward, and a job takes none"):
        Job("taste", read_config({"method": "spo"}), base)
    options = next(one.options for one in jobs.RetortTrainingJob.define_schema().inputs if one.id == "method")
    assert "spo" not in {option.key for option in options}
