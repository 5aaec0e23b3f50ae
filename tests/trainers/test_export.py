"""A finished LoRA's file holds what was trained, however small or large its weights are."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from retort.trainers.export import read_lora, stored, write_lora


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lora(size):
    """Two layers; lora_B of about this size, as trained from zero."""
    return {
        f"{layer}.lora_{half}.weight": random(*shape, seed=i) * (0.05 if half == "A" else size)
        for i, (layer, half, shape) in enumerate(
            [("q", "A", (16, 64)), ("q", "B", (64, 16)), ("k", "A", (16, 64)), ("k", "B", (96, 16))]
        )
    }


@pytest.mark.parametrize("size", [1e-12, 3e-8, 1e-6, 5e-6, 1e-5, 6e-5, 1e-3, 1.0, 1e4, 3e5])
def test_every_size_of_weight_is_kept(tmp_path, size):
    made = lora(size)
    read = load_file(write_lora(tmp_path, "made", made, {}))
    for name, value in made.items():
        back = read[name].double()
        assert not bool(((back == 0) & (value != 0)).any()), name
        assert bool((back.sign() == value.sign()).all())
        assert float((back - value).norm() / value.norm()) < 1e-3
    for layer in "qk":
        want, have = (
            file[f"{layer}.lora_B.weight"].double() @ file[f"{layer}.lora_A.weight"].double() for file in (made, read)
        )
        assert float((have - want).norm() / want.norm()) < 0.01


def test_usual_weights_are_half_the_size(tmp_path):
    read = read_lora(write_lora(tmp_path, "made", lora(1e-3), {}))
    assert {value.dtype for value in read.values()} == {torch.float16}
    read = read_lora(write_lora(tmp_path, "small", lora(1e-7), {}))
    assert {name: value.dtype for name, value in read.items() if "lora_B" in name} == {
        "q.lora_B.weight": torch.float32,
        "k.lora_B.weight": torch.float32,
    }
    assert all(value.dtype == torch.float16 for name, value in read.items() if "lora_A" in name)


def test_zeros_stay_zeros_and_a_tiny_weight_among_others_stays_a_weight():
    given = random(64, 16)
    given[:32], given[40, 3], given[41, 3] = 0.0, 1e-20, -1e-20
    back = stored(given)
    assert back.dtype == torch.float16 and not back[:32].any()
    assert float(back[40, 3]) == 2.0**-24 and float(back[41, 3]) == -(2.0**-24)
    assert not stored(torch.zeros(4, 4)).any() and stored(torch.zeros(4, 4)).dtype == torch.float16


def test_what_is_no_number_is_left_as_it_is():
    for bad in (float("nan"), float("inf"), 7e4):
        assert stored(torch.tensor([[1.0, bad]])).dtype == torch.float32


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_file_of_what_is_no_number_is_refused_by_name(tmp_path, kind, value):
    state = {f"{name}.lora_up.weight": torch.ones(3, 2) for name in "ab"}
    state["b.lora_up.weight"][1, 1] = value
    save_file({name: tensor.to(kind) for name, tensor in state.items()}, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=r"broken\.safetensors holds .* in 1 of its 2 tensors, such as 'b\.lora_up"):
        read_lora(tmp_path / "broken.safetensors")


def test_a_file_of_finite_numbers_is_read_whatever_their_kind(tmp_path):
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64)
    state = {f"{at}.lora_up.weight": torch.ones(3, 2).to(kind) for at, kind in enumerate(kinds)}
    save_file({**state, "empty.alpha": torch.ones(0)}, tmp_path / "good.safetensors")
    assert [tensor.dtype for name, tensor in read_lora(tmp_path / "good.safetensors").items() if name in state] == [
        state[name].dtype for name in sorted(state)
    ]


def test_a_pickle_is_refused_by_name(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "renamed.safetensors")
    with pytest.raises(ValueError, match=r"renamed\.safetensors is a pickle"):
        read_lora(tmp_path / "renamed.safetensors")
