"""Load Student in ComfyUI: a LoRA of every distillation method is sampled with nothing typed, to the bit as by hand."""

from __future__ import annotations

import pytest
import tiny_training as tiny
import torch

pytest.importorskip("peft")
pytestmark = pytest.mark.integration
files, loaded, host, quantised = tiny.files, tiny.loaded, tiny.host, tiny.quantised

# (settings, the mode by hand, its start)
STUDENTS = {
    "dmd2": ({"steps": 2, "ratio": 1}, "re-noise", "unit noise"),
    "f_distill": ({"steps": 2, "ratio": 1, "gan_on": "fake"}, "re-noise", "unit noise"),
    "tdm": ({"steps": 4}, "deterministic", "unit noise"),
    "di_star": ({"steps": 1, "ratio": 1}, "re-noise", "unit noise"),
    "instarevive": ({"timestep": 400}, "single call", "clean latent"),
}


@pytest.fixture
def trained(ours, host, loaded, comfy, monkeypatch, tmp_path):
    """trained(kind, method, settings) -> the name of a LoRA that ComfyUI lists."""
    monkeypatch.setattr(host, "loras_folder", lambda: tmp_path)
    monkeypatch.setitem(comfy.folders.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))

    def run(kind, method, settings):
        model, positive = loaded(kind)
        entry = tuple(positive[0])
        generator = torch.Generator().manual_seed(3)
        latents = [torch.randn(16, 8, 8, generator=generator) for _ in range(2)]
        pictures = [torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=generator) for _ in range(2)]
        data = ours("trainers.dataset").Dataset(
            [entry] * 2, [], (entry[0] * 0, entry[1]), latents, pictures=pictures if method == "instarevive" else None
        )
        training = {"steps": 1, "batch_size": 2, "warmup": 0, "learning_rate": 0.01, "preview_every": 0}
        config = {"method": method, "objective": settings, "training": training, "lora": {"rank": 2}}
        request = ours("hosts.training.run").Request(method, ours("trainers.methods").read_config(config), data)
        with torch.inference_mode():
            vae = comfy.plugin["RetortEmbeddedModel"].execute("flow").args[2] if method == "instarevive" else None
            result = ours("hosts.training.run").run(
                host, model, request, watcher=ours("trainers.watch").Silent(), folder=tmp_path / method, vae=vae
            )
        return result.path.name

    return run


@pytest.mark.parametrize("method", STUDENTS)
def test_a_student_is_sampled_with_nothing_typed_as_by_hand(comfy, node, sample, guided, loaded, trained, method):
    settings, mode, start = STUDENTS[method]
    name = trained("digits flow", method, settings)
    model, positive = loaded("digits flow")
    student, guider, sampler, sigmas, _ = node("RetortLoadStudent", model=model, positive=positive, lora_name=name)
    with torch.inference_mode():
        by_hand = comfy.nodes.LoraLoaderModelOnly().load_lora_model_only(model, name, 1.0)[0]
        steps = settings.get("steps", 1)
        levels = (
            node("RetortDistilledSigmas", model=model, preset="custom", steps=0, timesteps="400")[0]
            if method == "instarevive" else comfy.custom.BasicScheduler.execute(model, "simple", steps, 1.0)[0]
        )  # fmt: skip
    own = node("RetortDistilledSampler", preset="custom", mode=mode, start=start)[0]
    latent = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(8))
    latent = {"samples": latent * (start == "clean latent")}
    assert torch.equal(sigmas, levels)
    expected = sample(guided(by_hand, positive, positive), own, levels, latent)
    assert torch.equal(sample(guider, sampler, sigmas, latent), expected)
    assert not torch.equal(sample(guided(model, positive, positive), own, levels, latent), expected)
    assert student is not model and not model.patches


def test_a_quantised_base_keeps_its_weights_in_bypass(comfy, ours, host, node, sample, trained, quantised, monkeypatch):
    """What the LoRA adds is not rounded to fp8: the student's output is nearer to the exact one."""
    name = trained("sd3", "dmd2", {"steps": 2, "ratio": 1})
    model, positive = quantised
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    made = {}
    for bypass in (False, True):
        given = {"model": model, "positive": positive, "lora_name": name, "bypass": bypass}
        student, guider, sampler, sigmas, _ = node("RetortLoadStudent", **given)
        made[bypass] = sample(guider, sampler, sigmas, latent)
        assert bool(student.patches) != bypass and bool(student.injections) == bypass
    plain = sample(comfy.custom.BasicGuider.execute(model, positive)[0], sampler, sigmas, latent)
    assert torch.isfinite(made[True]).all() and not torch.equal(made[True], plain)
    assert float((made[True] - made[False]).abs().max()) < 0.5 * float((made[True] - plain).abs().max())
