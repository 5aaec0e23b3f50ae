"""Train Reward and Compare Models in real ComfyUI: as nodes on a server; the methods' gradients on other layouts."""

from __future__ import annotations

import pytest
import torch
import training_server as server

pytest.importorskip("peft")
pytestmark = [pytest.mark.integration, pytest.mark.slow]
tiny = server.tiny
app, spelled, base, files, error_of, succeeded = (
    server.app, server.spelled, server.base, server.files, server.error_of, server.succeeded,
)  # fmt: skip
loaded, host, x_of = tiny.loaded, tiny.host, tiny.x_of
SHORT = {
    "align_prop": {"steps": 3, "truncation": "fixed", "last": 2},
    "spo": {"steps": 3, "candidates": 2, "trained": 1},
    "flow_grpo": {"steps": 3, "group": 2},
}


def _nodes(spelled, base, kind, method, reward="embedded_judge"):
    nodes, given = base(kind)
    nodes["r"] = spelled("RetortReward", kind=reward, **({"kind.boldness": 1.0} if reward == "embedded_judge" else {}))
    settings = {"method": method, **{f"method.{k}": v for k, v in SHORT[method].items()}}
    name = f"{kind} {method}"
    given |= {**server.QUICK, "name": name, "vae": ["m", 2], "reward": ["r", 0], "preview_every": 2, "previews": 1}
    nodes["t"] = spelled("RetortTrainReward", **given, **settings)
    return nodes, name


@pytest.mark.parametrize(
    ("kind", "method"),
    [("digits flow", "align_prop"), ("digits eps", "align_prop"), ("digits eps", "spo"), ("digits flow", "flow_grpo")],
)
def test_a_taste_is_trained_and_compared(app, spelled, base, kind, method):
    nodes, name = _nodes(spelled, base, kind, method)
    nodes["load"] = spelled("LoraModelLoader", model=["m", 0], lora=["t", 0])
    nodes["sampler"] = spelled("KSamplerSelect", sampler_name="euler")
    nodes["sigmas"] = spelled("BasicScheduler", model=["m", 0], scheduler="simple", steps=3, denoise=1.0)
    nodes["c"] = spelled(
        "RetortCompareModels", base=["m", 0], tuned=["load", 0], clip=["m", 1], vae=["m", 2], reward=["r", 0],
        sampler=["sampler", 0], sigmas=["sigmas", 0], latent=["size", 0], prompts=server.PROMPTS, per_prompt=2, shown=4,
    )  # fmt: skip
    nodes["text"] = spelled("PreviewAny", source=["c", 4])
    done = succeeded(app.run(nodes))
    assert done["outputs"]["t"]["text"] == [f"{name}.safetensors, 2 steps"]
    assert (app.base / "output" / "retort" / name / "previews" / "step_0000002.png").is_file()
    assert done["outputs"]["c"]["images"] and done["outputs"]["c"]["text"][0].startswith("tuned against base")
    (text,) = done["outputs"]["text"]["text"]
    assert text.startswith("tuned against base by embedded judge: wins ") and len(text.splitlines()) == 2 + 6
    # Training leaves the MODEL that others share as it was: its pictures differ from the LoRA's.
    assert any(line.split()[1] != line.split()[3] for line in text.splitlines()[2:])


def test_what_cannot_be_is_said(app, spelled, base):
    nodes, _ = _nodes(spelled, base, "digits flow", "align_prop", "jpeg")
    assert "has no gradient, and align_prop needs a differentiable one" in error_of(app.run(nodes))
    nodes, _ = _nodes(spelled, base, "digits eps", "flow_grpo")
    assert "predicts eps: choose spo or align_prop" in error_of(app.run(nodes))
    nodes, _ = _nodes(spelled, base, "digits flow", "spo")
    nodes["t"]["inputs"]["prompts"] = ""
    assert "there are no prompts" in error_of(app.run(nodes))


@pytest.mark.parametrize(
    ("kind", "method"),
    [("sd15", "align_prop"), ("sd15", "spo"), ("sd3", "align_prop"), ("sd3", "flow_grpo"), ("wan", "align_prop")],
)
def test_gradients_of_each_layout_with_and_without_checkpoints(ours, host, loaded, kind, method):
    """On a UNet, a joint transformer and a video model, with ComfyUI's own conditions and guidance."""
    model, positive = loaded(kind)
    contract = ours("trainers.objectives.parts.contract")
    settings = {"method": method, "objective": {**SHORT[method], "cfg": 2.0}, "lora": {"rank": 2}}
    config = ours("trainers.methods").read_config(settings)
    found = []
    with host.training_session():
        for checkpoints in (False, True):
            denoiser = host.trainable(model)
            objective = ours("trainers.methods").METHODS[method].objective(config.objective, denoiser)
            ours("hosts.training.assembly").add_adapters(denoiser, config, objective, None)
            denoiser.place(0)
            shape = x_of(kind).shape[1:]
            cond = denoiser.encode(positive, (1, *shape))
            without = denoiser.encode([[positive[0][0] * 0, positive[0][1]]], (1, *shape))
            objective.reward = lambda x, prompts, batch: -x.square().flatten(1).mean(1)
            pair = [denoiser.join([one] * 2) for one in (cond, without)]
            batch = contract.Batch(contract.Draws(0, 0, (0, 1), denoiser.device), shape, *pair, prompts=("a", "b"))
            objective.prepare([batch])
            if checkpoints:
                assert ours("trainers.checkpointing").enable(denoiser.network)
            for loss in objective.losses(batch, 0):
                with denoiser.adapter("student"):
                    loss.value.backward()
            found.append({k: p.grad.clone() for k, p in denoiser.adapters.parameters("student").items()})
            ours("trainers.checkpointing").disable(denoiser.network)
            denoiser.release()
    plain, again = found
    assert sum(float(g.abs().sum()) > 0 for g in plain.values()) >= len(plain) / 3
    assert all(torch.isfinite(g).all() and torch.allclose(g, again[k], rtol=1e-3, atol=1e-6) for k, g in plain.items())
