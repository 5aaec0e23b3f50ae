"""Every method takes its steps on layouts that training meets beside the embedded one: video, Flux, v prediction."""

from __future__ import annotations

import json

import pytest
import tiny_training as tiny
import torch

pytest.importorskip("peft")
pytestmark = pytest.mark.integration
files, loaded, host, sampled, quantised = tiny.files, tiny.loaded, tiny.host, tiny.sampled, tiny.quantised
SHAPES, level, module, x_of = tiny.SHAPES, tiny.level, tiny.module, tiny.x_of

METHODS = {
    "dmd2": {"gan_weight": 0.01, "ratio": 1, "regression_weight": 0.2, "pairs": 2, "pair_steps": 1},
    "f_distill": {"gan_on": "fake", "ratio": 1, "steps": 2},
    "tdm": {"steps": 2},
    "di_star": {"ratio": 1},
    "flow": {},
    "few_shot": {"source_steps": 1},
}


@pytest.fixture
def trained(ours, host, loaded, card, monkeypatch, tmp_path):
    """trained(model, positive, kind, method, **training) -> (result, rows of its log), written below tmp_path."""
    monkeypatch.setattr(host, "loras_folder", lambda: tmp_path / "loras")

    def run(model, positive, kind, method, **training):
        entry = tuple(positive[0])
        shape = x_of(kind).shape[1:]
        latents = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
        data = ours("trainers.dataset").Dataset([entry] * 2, [], (entry[0] * 0, entry[1]), latents)
        settings = {
            "steps": 2, "batch_size": 2, "warmup": 0, "learning_rate": 0.01, "gradient_checkpointing": True,
            "preview_every": 2, "previews": 2, "offload": "99" if card == "little" else "auto", **training,
        }  # fmt: skip
        config = {"method": method, "objective": METHODS[method], "training": settings, "lora": {"rank": 2}}
        request = ours("hosts.training.run").Request(method, ours("trainers.methods").read_config(config), data)
        with torch.inference_mode():
            result = ours("hosts.training.run").run(
                host, model, request, watcher=ours("trainers.watch").Silent(), folder=tmp_path / method
            )
        return result, [json.loads(row) for row in (tmp_path / method / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.mark.parametrize(
    ("kind", "method"), [*(("wan", method) for method in METHODS), ("flux", "dmd2"), ("flux", "few_shot")]
)
def test_a_method_trains_with_checkpoints_and_previews(loaded, trained, kind, method, tmp_path):
    model, positive = loaded(kind)
    result, rows = trained(model, positive, kind, method)
    assert len(rows) == 2 and all(torch.isfinite(torch.tensor(row["student_loss"])) for row in rows)
    assert result.path.is_file() and (tmp_path / method / "previews" / "step_0000002.png").is_file()


def test_a_quantised_base_with_the_users_lora_is_distilled(comfy, trained, quantised):
    """Teacher and fake score share the quantised weights; the LoRA that the MODEL carries is part of the teacher."""
    model, positive = quantised
    first, _ = trained(model, positive, "sd3", "flow")
    with torch.inference_mode():
        patched = comfy.sd.load_lora_for_models(model, None, first.lora, 1.0, 0.0)[0]
    result, rows = trained(patched, positive, "sd3", "dmd2")
    assert len(rows) == 2 and result.path.is_file()
    notes = [json.loads((folder / "origin.json").read_text())["model"] for folder in (first.folder, result.folder)]
    assert notes[0] != notes[1]


@pytest.mark.parametrize("method", ["dmd2", "flow"])
def test_v_prediction_and_bf16(comfy, host, loaded, sampled, trained, method):
    """The v of SD2 and of many SDXL tunes, by core's own node."""
    model, positive = loaded("sd15")
    patch = module("comfy_extras.nodes_model_advanced").ModelSamplingDiscrete().patch
    with torch.inference_mode():
        model = patch(model, "v_prediction", False)[0]
    result, rows = trained(model, positive, "sd15", method, precision="bf16")
    assert len(rows) == 2 and all(torch.isfinite(torch.tensor(row["student_loss"])) for row in rows)
    denoiser = host.trainable(model)
    denoiser.place(0)
    assert denoiser.prediction == "v" and denoiser.path.kind == "VE"
    x, sigma = x_of("sd15"), level(denoiser)
    with torch.no_grad():
        cond = denoiser.join([denoiser.encode(positive, x.shape)])
        x0 = denoiser.predict_x0(x.to(denoiser.device), torch.tensor([sigma], device=denoiser.device), cond)
    assert tiny.close(x0.cpu(), sampled(model, positive, x, sigma))
    denoiser.release()
