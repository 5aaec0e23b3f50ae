"""The shipped weights: they load, fit their budget, and do what the model card says, roughly and in seconds."""

import functools

import pytest
import torch

from retort.benchmarks.distillation import RUNS
from retort.models import autoencoder, digits, evaluate, loader, twins
from retort.sampling.path import FLOW, VE

FILES = sorted(loader.FOLDER.rglob("*.safetensors"))


def held_out(count=64):
    fields, labels = digits.load("held_out")
    return digits.draw(fields[:count], labels[:count], torch.Generator().manual_seed(5))


def test_together_they_stay_under_sixty_megabytes():
    names = {str(path.relative_to(loader.FOLDER)).replace("\\", "/") for path in FILES}
    wanted = {
        *loader.CHECKPOINTS.values(),
        *loader.STUDENTS.values(),
        *loader.STYLES.values(),
        *loader.RESTORERS.values(),
        loader.STATISTICS,
        loader.CAPTIONER,
        loader.PHOTOGRAPHS,
        loader.PHOTO_EYE,
        "digits_text.safetensors",
        "digits_judge.safetensors",
    }
    assert names == wanted
    assert sum(path.stat().st_size for path in FILES) < 60e6


@pytest.mark.parametrize("variant", loader.CHECKPOINTS)
def test_every_variant_loads_and_is_its_own(variant):
    state = loader.network_state(variant)
    assert all(torch.isfinite(value).all() for value in state.values())
    others = [loader.network_state(v) for v in loader.CHECKPOINTS if v != variant]
    key = "joint_blocks.0.x_block.mlp.fc1.weight"
    assert not any(torch.equal(state[key], other[key]) for other in others)
    with torch.inference_mode():
        out = loader.load_transformer(variant)(
            torch.randn(2, 16, 8, 8), torch.full((2,), 500.0), torch.randn(2, 16, 128), torch.randn(2, 128)
        )
    assert out.shape == (2, 16, 8, 8)


def test_unknown_variants_are_refused_by_name():
    with pytest.raises(ValueError, match="flow, eps, flow early, eps early"):
        loader.network_state("video")


def test_the_autoencoder_keeps_the_picture_and_its_latents_have_unit_variance():
    model, image = loader.load_autoencoder(), held_out().image
    with torch.inference_mode():
        latent = model.encode(image)
        again = model.decode(latent).clamp(0, 1)
    psnr = -10 * torch.log10((again - image).square().mean())
    assert psnr > 24 and 0.9 < float(latent.std()) < 1.1
    state = loader._part(loader.CHECKPOINTS["flow"], loader.VAE_PREFIX)
    assert float(state["vae_scale"]) == pytest.approx(autoencoder.SCALE, abs=1e-7)
    assert float(state["vae_shift"]) == pytest.approx(autoencoder.SHIFT, abs=1e-7)


def test_the_autoencoder_is_what_stock_loaders_read_from_the_file():
    full = autoencoder.Autoencoder()
    state = loader._part(loader.CHECKPOINTS["flow"], loader.VAE_PREFIX)
    full.load_state_dict({k: v for k, v in state.items() if not k.startswith("vae_")})
    narrow, image = loader.load_autoencoder(), held_out().image[:4]
    with torch.inference_mode():
        latent = full.encode(image)
        torch.testing.assert_close(narrow.encode(image), latent, rtol=0, atol=1e-5)
        torch.testing.assert_close(narrow.decode(latent), full.decode(latent), rtol=0, atol=1e-5)


def test_the_judge_reads_digits_that_it_never_saw():
    batch = held_out(200)
    with torch.inference_mode():
        answers = loader.load_judge()(batch.image)
    for name, least in (("digit", 0.95), ("ink", 0.98), ("paper", 0.98), ("weight", 0.75), ("slant", 0.85)):
        assert float((answers[name].argmax(1) == getattr(batch, name)).float().mean()) > least, name


@pytest.mark.parametrize(("kind", "path"), [("flow", FLOW), ("eps", VE)])
def test_a_twin_draws_what_it_is_asked_for(kind, path):
    network = loader.load_transformer(kind).network
    figures, image = evaluate.figures(kind, network, 12, count=32, seed=3)
    assert figures.prompt > 0.65
    assert figures.attributes["ink"] > 0.9 and figures.attributes["paper"] > 0.9
    assert image.shape == (32, 3, 64, 64)
    assert twins.Denoiser(kind, network, {}).path == path


@functools.cache
def drawn_in(kind, calls, mode, student=None):
    loras = ((loader.load_student(student), 1.0),) if student else ()
    network = loader.load_transformer(kind, loras).network
    return evaluate.figures(kind, network, calls, student=mode, count=32, seed=3)[0]


@pytest.mark.parametrize("name", RUNS)
def test_a_student_draws_what_it_is_asked_for(name):
    run = RUNS[name]
    student = drawn_in(run.kind, run.calls, run.mode, name)
    assert student.prompt > 0.8
    if run.calls == 1:
        # Without guidance, which students have learnt, the teacher is blurred in one call.
        assert student.frechet < drawn_in(run.kind, run.calls, run.mode, None).frechet


def test_the_shipped_students_are_those_of_the_benchmark():
    assert set(loader.STUDENTS) == set(RUNS)
    assert all(name.startswith(run.kind) and name.endswith(f"_{run.calls}step") for name, run in RUNS.items())
    assert {run.kind for run in RUNS.values()} == set(twins.KINDS)


def test_guidance_needs_its_unconditional_branch():
    with pytest.raises(ValueError, match="uncond"):
        twins.Denoiser("flow", loader.load_transformer("flow").network, {}, cfg=3.0)
