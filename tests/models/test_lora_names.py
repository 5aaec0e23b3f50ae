"""LoRA files of which all, some or no tensor belongs to a network, under newer and older names."""

from __future__ import annotations

import pytest
import torch

from retort.models.layouts.lora_names import for_network, merged, pairs
from retort.models.layouts.renames import Layout

LAYERS = [f"blocks.{i}.attn.{name}" for i in range(2) for name in ("to_q", "to_k", "to_v", "to_out.0")]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def old(layers, prefix="unet."):
    """As diffusers' first scripts wrote them."""
    state = {}
    for i, layer in enumerate(layers):
        block, _, name = layer.removesuffix(".0").rpartition(".")
        stem = f"{prefix}{block}.processor.{name}_lora"
        state |= {f"{stem}.down.weight": random(2, 8, seed=i), f"{stem}.up.weight": random(8, 2, seed=i + 50)}
    return state


@pytest.mark.parametrize("prefix", ["unet.", "", "transformer."])
def test_names_of_attention_processors_are_those_of_the_layers(prefix):
    told = []
    found = for_network(old(LAYERS, prefix), Layout(), LAYERS, told.append)
    assert sorted(found) == sorted(f"{layer}.lora_{half}.weight" for layer in LAYERS for half in "AB") and not told
    for i, layer in enumerate(LAYERS):
        assert torch.equal(found[f"{layer}.lora_A.weight"], random(2, 8, seed=i))
        assert torch.equal(found[f"{layer}.lora_B.weight"], random(8, 2, seed=i + 50))


def test_some_layers_are_used_and_the_others_counted():
    told = []
    state = old([*LAYERS[:3], "nowhere.attn.to_q", "nowhere.attn.to_k"]) | {"emb_params": torch.zeros(4, 8)}
    found = for_network(state, Layout(), LAYERS, told.append)
    assert len(found) == 6
    assert told == [
        "2 of the LoRA's layers, such as unet.nowhere.attn.to_q, are not in this model and 1 of its tensors, such as "
        "'emb_params', are no part of a LoRA: they are left out, and 3 layers are used"
    ]


def test_where_nobody_listens_the_log_has_it(caplog):
    for_network(old([LAYERS[0], "nowhere.attn.to_q"]), Layout(), LAYERS)
    assert "1 of the LoRA's layers, such as unet.nowhere.attn.to_q" in caplog.text


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (old(["nowhere.attn.to_q", "nowhere.attn.to_k"]), "2 layers that this model lacks, such as unet.nowhere.attn"),
        ({"emb_params": torch.zeros(4, 8)}, "is no LoRA: it holds 1 tensors such as 'emb_params'"),
        ({"x.weight": torch.zeros(2, 2), "a.bias": torch.zeros(2)}, "no LoRA: it holds 2 tensors such as 'a.bias'"),
        ({}, "is no LoRA: it holds nothing"),
        (
            {"lora_te_q.lora_down.weight": torch.zeros(2, 8), "lora_te_q.lora_up.weight": torch.zeros(8, 2)},
            "'lora_te_q.lora_down.weight', are a text encoder's alone",
        ),
    ],
)
def test_of_none_there_is_an_example(state, says):
    with pytest.raises(ValueError, match=says):
        for_network(state, Layout(), LAYERS)


def test_half_an_old_pair_is_damaged():
    state = old(LAYERS[:1])
    del state["unet.blocks.0.attn.processor.to_q_lora.up.weight"]
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.to_q has no second half"):
        pairs(state)


ODD = {
    "another rank": (torch.ones(2, 8), torch.ones(8, 3), None, "no pair"),
    "turned": (torch.ones(2, 8), torch.ones(2, 8), None, "no pair"),
    "no rank": (torch.ones(0, 8), torch.ones(8, 0), None, "no pair"),
    "a number": (torch.ones(2, 8), torch.tensor(1.0), None, "no pair"),
    "a row": (torch.ones(8), torch.ones(8, 1), None, "no pair"),
    "alphas": (torch.ones(2, 8), torch.ones(8, 2), torch.ones(3), "an alpha of 3 numbers"),
}


@pytest.mark.parametrize("name", ODD)
def test_halves_that_are_no_pair_are_named(name):
    down, up, alpha, says = ODD[name]
    state = {"a.to_q.lora_down.weight": down, "a.to_q.lora_up.weight": up}
    state |= {} if alpha is None else {"a.to_q.alpha": alpha}
    with pytest.raises(ValueError, match=rf"the LoRA's layer a\.to_q has .*{says}"):
        pairs(state)


def test_a_layer_of_another_width_is_named():
    weights = {"a.weight": torch.zeros(8, 6), "c.weight": torch.zeros(8, 2, 3, 3)}
    good = {"a.lora_A.weight": torch.ones(2, 6), "a.lora_B.weight": torch.ones(8, 2)}
    good |= {"c.lora_A.weight": torch.ones(2, 2, 3, 3), "c.lora_B.weight": torch.ones(8, 2, 1, 1)}
    assert [name for name, _ in merged(weights, good, 1.0)] == ["a.weight", "c.weight"]
    for half, value in (("lora_A", torch.ones(2, 7)), ("lora_B", torch.ones(9, 2))):
        with pytest.raises(ValueError, match=r"the LoRA's layer a is for one of . x ., and the model's has 8 x 6"):
            list(merged(weights, {**good, f"a.{half}.weight": value}, 1.0))
