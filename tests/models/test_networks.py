"""The embedded networks: layouts, padding, LoRA names, Fréchet distance, and the loop that trains them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from retort.models import judge, layout, loader, training
from retort.models.autoencoder import Autoencoder, padded
from retort.models.layouts.lora_names import merged


def test_the_sd3_layout_round_trips_through_our_table_and_through_diffusers_own_converter():
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    torch.manual_seed(0)
    state = layout.network().state_dict()
    published = layout.to_sd3_layout(state)
    for back in (layout.from_sd3_layout(published), convert_sd3_transformer_checkpoint_to_diffusers(dict(published))):
        assert back.keys() == state.keys()
        assert all(torch.equal(back[k], v) for k, v in state.items())


def test_a_padded_autoencoder_is_the_narrow_one():
    torch.manual_seed(0)
    narrow = Autoencoder(widths=(4, 6, 8, 10), active=(0, 1, 2, 1)).eval()
    full = Autoencoder().eval()
    full.load_state_dict({k: v for k, v in padded(narrow).items() if not k.startswith("vae_")})
    image = torch.rand(2, 3, 32, 40)
    with torch.no_grad():
        latent = narrow.encode(image)
        assert latent.shape == (2, 16, 4, 5)
        assert torch.allclose(full.encode(image), latent, atol=1e-5)
        assert torch.allclose(full.decode(latent), narrow.decode(latent), atol=1e-5)


def lora_for(name: str, shape: torch.Size, prefix: str, down="lora_A", up="lora_B"):
    generator = torch.Generator().manual_seed(1)
    return {
        f"{prefix}{name}.{down}.weight": torch.randn(4, shape[1], generator=generator),
        f"{prefix}{name}.{up}.weight": torch.randn(shape[0], 4, generator=generator),
    }


def test_a_lora_merges_the_same_under_its_three_names():
    torch.manual_seed(0)
    state = layout.to_sd3_layout(layout.network().state_dict())
    ours, theirs = "joint_blocks.0.x_block.mlp.fc1", "transformer_blocks.0.ff.net.0.proj"
    shape = state[f"{ours}.weight"].shape
    forms = [
        lora_for(theirs, shape, "transformer."),
        lora_for(ours, shape, "diffusion_model."),
        lora_for(ours.replace(".", "_"), shape, "lora_unet_", "lora_down", "lora_up"),
    ]
    merged = [loader.merge_lora(state, form, 0.7)[f"{ours}.weight"] for form in forms]
    b, a = forms[0][f"transformer.{theirs}.lora_B.weight"], forms[0][f"transformer.{theirs}.lora_A.weight"]
    assert torch.allclose(merged[0], state[f"{ours}.weight"] + 0.7 * b @ a, atol=1e-5)
    assert torch.allclose(merged[0], merged[1], atol=1e-6) and torch.allclose(merged[0], merged[2], atol=1e-6)


def test_a_lora_on_one_of_three_fused_projections_leaves_the_others():
    torch.manual_seed(0)
    state = layout.to_sd3_layout(layout.network().state_dict())
    lora = lora_for("transformer_blocks.1.attn.to_k", torch.Size((192, 192)), "transformer.")
    changed = loader.merge_lora(state, lora, 1.0)["joint_blocks.1.x_block.attn.qkv.weight"]
    moved = (changed - state["joint_blocks.1.x_block.attn.qkv.weight"]).abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == list(range(192, 384))


def test_alpha_scales_and_strange_layers_are_refused():
    torch.manual_seed(0)
    state = layout.to_sd3_layout(layout.network().state_dict())
    lora = lora_for("joint_blocks.0.x_block.mlp.fc1", torch.Size((768, 192)), "diffusion_model.")
    key = "joint_blocks.0.x_block.mlp.fc1.weight"
    whole = loader.merge_lora(state, lora, 1.0)[key] - state[key]
    half = loader.merge_lora(
        state, lora | {"diffusion_model.joint_blocks.0.x_block.mlp.fc1.alpha": torch.tensor(2.0)}, 1.0
    )
    assert torch.allclose(half[key] - state[key], whole / 2, atol=1e-5)
    with pytest.raises(ValueError, match=r"layers that this model lacks, such as diffusion_model\.blocks"):
        loader.merge_lora(state, lora_for("blocks.9.linear", torch.Size((8, 8)), "diffusion_model."), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_weight_is_rounded_once_and_the_given_one_stays(dtype):
    """A convolution and a linear layer, of more than one number each."""
    torch.manual_seed(0)
    weights = {"conv.weight": torch.randn(6, 4, 3, 3).to(dtype), "out.weight": torch.randn(5, 7).to(dtype)}
    before = {name: weight.clone() for name, weight in weights.items()}
    lora = {
        "conv.lora_A.weight": torch.randn(2, 4, 3, 3), "conv.lora_B.weight": torch.randn(6, 2, 1, 1),
        "out.lora_A.weight": torch.randn(3, 7), "out.lora_B.weight": torch.randn(5, 3),
    }  # fmt: skip
    found = dict(merged(weights, lora, -0.7))
    added = {
        "conv.weight": torch.einsum("or,rihw->oihw", lora["conv.lora_B.weight"][..., 0, 0], lora["conv.lora_A.weight"]),
        "out.weight": lora["out.lora_B.weight"] @ lora["out.lora_A.weight"],
    }
    for name, change in added.items():
        exact = (before[name].double() - 0.7 * change.double()).to(dtype)
        torch.testing.assert_close(found[name], exact, atol=1e-5, rtol=torch.finfo(dtype).eps)
    assert all(torch.equal(weights[name], before[name]) and found[name].dtype == dtype for name in weights)
    with pytest.raises(KeyError, match="other"):
        dict(merged(weights, {"other.lora_A.weight": torch.zeros(1, 1), "other.lora_B.weight": torch.zeros(1, 1)}, 1))


def test_frechet_distance_of_two_gaussians():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200000, 3, generator=generator, dtype=torch.float64)
    b = a * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([3.0, 0.0, 0.0])
    # (mu) 9 + (1 - 1)^2 + (2 - 1)^2 + (0.5 - 1)^2 for diagonal covariances.
    assert judge.frechet_distance(a, b) == pytest.approx(10.25, rel=0.01)
    assert judge.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def line():
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def toy(model):
    def loss(generator):
        x = torch.randn(8, 3, generator=generator)
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    return loss


class Stop(Exception):
    """What an interrupted training ends with."""


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path):
    schedule = training.Schedule(40, save_every=10)
    model = line()
    training.train("whole", model, toy(model), schedule, 1, tmp_path)
    stopped, calls = line(), []

    def interrupted(generator):
        calls.append(1)
        if len(calls) == 26:
            raise Stop
        return toy(stopped)(generator)

    with pytest.raises(Stop):
        training.train("parts", stopped, interrupted, schedule, 1, tmp_path)
    again = line()
    training.train("parts", again, toy(again), schedule, 1, tmp_path)
    assert torch.equal(again.weight, model.weight) and torch.equal(again.bias, model.bias)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_weights(tmp_path: Path):
    model, calls = line(), []

    def loss(generator):
        calls.append(1)
        return toy(model)(generator) * (float("nan") if len(calls) == 15 else 1.0)

    with pytest.raises(FloatingPointError, match="step 14"):
        training.train("nan", model, loss, training.Schedule(40, save_every=10), 1, tmp_path)
    assert (tmp_path / "nan.safetensors").exists() and not list(tmp_path.glob("*.part"))
