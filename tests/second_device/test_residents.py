"""Without ComfyUI, too, a training finds the memory that sampling took, and previews give theirs back."""

from __future__ import annotations

import outlines
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffusers import AutoencoderKL

from retort.hosts.headless import folders, residents, vaes
from retort.hosts.headless.host import host
from retort.hosts.headless.samplers import StandardSampler

EULER = StandardSampler("euler")
SMALL = {**outlines.FLUX_SMALL, "num_layers": 1, "num_single_layers": 2}


def taken() -> int:
    torch.accelerator.synchronize()
    return torch.accelerator.memory_allocated()


@pytest.fixture
def vae():
    torch.manual_seed(0)
    made = AutoencoderKL(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
    )  # fmt: skip
    return vaes.from_module(made)


@pytest.fixture(autouse=True)
def empty():
    residents.make_room()
    yield
    residents.make_room()


def test_a_training_finds_the_memory_that_sampling_took(second, tmp_path, vae):
    with folders.use(folders.Folders(models=(tmp_path,), output=tmp_path / "output")):
        model = outlines.model_of(outlines.FLUX, SMALL, real=True)
        before = taken()
        data = outlines.dataset_of((16, 8, 8), (16, 64), 32)
        guider = host.cfg_guider(model, [list(data.entries[0])], None, 1.0)
        latent = {"samples": torch.zeros(1, 16, 8, 8)}
        sigmas = torch.tensor([1.0, 0.5, 0.0])
        first = host.sample(guider, EULER, sigmas, latent, 3)
        picture = host.decode(vae, torch.ones(1, 4, 8, 8))
        held = taken() - before
        weights = sum(weight.nbytes for weight in model.network.module.parameters())
        assert held > 0.9 * weights
        denoiser = host.trainable(model)
        assert taken() - before < 0.1 * held
        denoiser.release()
        # And both come back by themselves, with the same numbers.
        assert host.sample(guider, EULER, sigmas, latent, 3).equal(first)
        assert host.decode(vae, torch.ones(1, 4, 8, 8)).equal(picture)
        assert taken() - before > 0.9 * weights


def test_a_preview_gives_its_vae_back_and_gradients_keep_theirs(second, vae):
    latents = torch.ones(1, 4, 8, 8)
    before = taken()
    with host.training_session():
        plain = host.decode(vae, latents)
        assert taken() - before < 4096
        decoder = host.differentiable_decoder(vae)
        x = latents.clone().requires_grad_()
        shown = decoder(x)
        shown.sum().backward()
        assert torch.allclose(shown.detach().cpu(), plain, atol=1e-6) and bool(x.grad.abs().sum() > 0)


def test_what_was_sampled_from_is_trained_through(second, tmp_path):
    """A network that was moved in inference mode would take no gradients."""
    network = torch.nn.Linear(4, 4)
    with torch.inference_mode():
        residents.brought(network, torch.device("second"))
    residents.make_room()
    assert network.weight.device.type == "cpu" and not network.weight.is_inference()
    network(torch.ones(1, 4)).sum().backward()

