"""The preference nodes on a real ComfyUI server: candidates sampled, labelled, learnt from, and sampled again."""

from __future__ import annotations

import json

import pytest
import torch
import training_server as server
from safetensors.torch import load_file

pytest.importorskip("peft")
pytestmark = [pytest.mark.integration, pytest.mark.slow]
files, app, spelled, base, drawn = server.files, server.app, server.spelled, server.base, server.drawn
QUICK, error_of, succeeded = server.QUICK, server.error_of, server.succeeded
SIZES = {"sd3": (8, 64, 48), "sd15": (77, 768, 48)}


def candidates(nodes, spelled, variant, count=4):
    """Sampled pictures of the embedded model, and a reward that compares them."""
    nodes["many"] = spelled("EmptySD3LatentImage", width=64, height=64, batch_size=count)
    nodes["drawn"] = spelled(
        "KSampler", model=["m", 0], seed=1, steps=4, cfg=1.0, sampler_name="euler", scheduler="simple",
        positive=["p", 0], negative=["p", 0], latent_image=["many", 0], denoise=1.0,
    )  # fmt: skip
    nodes["pictures"] = spelled("VAEDecode", samples=["drawn", 0], vae=["m", 2])
    nodes["reward"] = spelled("RetortReward", kind="embedded_judge", **{"kind.boldness": 2.0})


@pytest.mark.parametrize(
    ("kind", "method", "settings"),
    [
        ("digits flow", "dpo", {"method.beta": 500.0}),
        ("digits eps", "smpo", {"method.inversion_steps": 2}),
        ("digits eps", "mapo", {}),
    ],
)
def test_sampled_labelled_learnt_and_sampled_again(app, spelled, base, drawn, kind, method, settings):
    nodes, _ = base(kind)
    name = f"{method} {kind}"
    candidates(nodes, spelled, kind)
    given = {"reward": ["reward", 0], "name": name, "prompt": "a thin red two"}
    kept = {"images": ["pictures", 0]} if method == "dpo" else {"latents": ["drawn", 0], "vae": ["m", 2]}
    nodes["label"] = spelled("RetortLabelPairs", **given, **kept)
    nodes["set"] = spelled("RetortPreferenceSet", pairs=["label", 0])
    connected = {"model": ["m", 0], "clip": ["m", 1], "vae": ["m", 2], "pairs": ["set", 0]}
    nodes["t"] = spelled("RetortTrainPreference", **connected, **QUICK, name=name, method=method, **settings)
    nodes["load"] = spelled("LoraModelLoader", model=["m", 0], lora=["t", 0])
    drawn(nodes, {"before": ["m", 0], "after": ["load", 0]})
    done = succeeded(app.run(nodes))
    before, after = drawn.read(done, "before"), drawn.read(done, "after")
    assert torch.isfinite(after).all() and (after - before).abs().max() > 1e-4
    assert done["outputs"]["t"]["text"] == [f"{name}.safetensors, 2 steps"]
    assert done["outputs"]["set"]["text"][0].startswith("6 pairs, 1 prompts, 4 pictures")
    folder = app.base / "output" / "retort_preferences" / name
    rows = [json.loads(row) for row in (folder / "pairs.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and all((folder / row["winner"]).is_file() and row["strength"] > 0 for row in rows)
    log = (app.base / "output" / "retort" / name / "metrics.jsonl").read_text().splitlines()
    first = json.loads(log[0])
    assert first["student_loss"] == pytest.approx(0.6931, abs=1e-3) or method == "mapo"
    assert load_file(app.base / "models" / "loras" / f"{name}.safetensors")


@pytest.mark.parametrize(("kind", "method"), [("sd3", "dpo"), ("sd15", "smpo"), ("sd15", "mapo")])
def test_other_networks_learn_from_latents(app, spelled, base, drawn, kind, method):
    """Pairs of latents that a script wrote, on networks without a text encoder or a VAE of their own."""
    import importlib

    preferences = importlib.import_module("retort.preferences.store")
    name = f"{method} {kind}"
    folder = app.base / "output" / "retort_preferences" / name
    generator = torch.Generator().manual_seed(0)
    channels = 4 if kind == "sd15" else 16
    names = [preferences.keep_latent(folder, torch.randn(channels, 8, 8, generator=generator)) for _ in range(4)]
    rows = [{"prompt": p, "winner": names[w], "loser": names[x], "strength": 1.0, "by": "script"}
            for p, w, x in (("a one", 0, 1), ("a two", 2, 3))]  # fmt: skip
    preferences.append(folder, [*rows, {"prompt": "a one", "winner": names[1], "loser": names[2]}])
    with open(folder / "pairs.jsonl", "a") as handle:
        handle.write('{"prompt": "torn')
    nodes, _ = base(kind)
    nodes["text"] = {
        "class_type": "TinyText", "inputs": dict(zip(("length", "width", "pooled"), SIZES[kind], strict=True)),
    }  # fmt: skip
    nodes["set"] = spelled("RetortPreferenceSet", name=name)
    given = {"model": ["m", 0], "clip": ["text", 0], "pairs": ["set", 0]}
    nodes["t"] = spelled("RetortTrainPreference", **given, **QUICK, name=name, method=method)
    nodes["load"] = spelled("LoraModelLoader", model=["m", 0], lora=["t", 0])
    drawn(nodes, {"before": ["m", 0], "after": ["load", 0]})
    done = succeeded(app.run(nodes))
    before, after = drawn.read(done, "before"), drawn.read(done, "after")
    assert torch.isfinite(after).all() and (after - before).abs().max() > 1e-4
    assert "line 4: it is not finished" in done["outputs"]["set"]["text"][0]


def test_mistakes_are_told_on_the_node(app, spelled, base):
    nodes, _ = base("digits flow")
    nodes["set"] = spelled("RetortPreferenceSet", name="nobody's")
    done = app.run(nodes)
    assert "RetortPreferenceSet: " in error_of(done) and "is empty" in error_of(done)
