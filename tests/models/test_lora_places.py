"""Names of a LoRA's tensors: taken apart, found in a network, and told apart where there is none."""

from __future__ import annotations

import pytest
import torch

from retort.models.layouts import lora_keys as keys
from retort.models.layouts.lora_places import Line, Names, Place, lines, placed_in, seems_for
from retort.models.layouts.lora_state import fused_pairs, read, whole


@pytest.mark.parametrize(
    ("name", "stem", "what"),
    [
        ("a.b.lora_A.weight", "a.b", keys.DOWN),
        ("a.b.lora_B.default.weight", "a.b", keys.UP),
        ("a.b.lora_up.weight", "a.b", keys.UP),
        ("a.b.lora_A", "a.b", keys.DOWN),
        ("a.b_lora.down.weight", "a.b", keys.DOWN),
        ("a.b.lora.up.weight", "a.b", keys.UP),
        ("a.b.lora_linear_layer.up.weight", "a.b", keys.UP),
        ("a.processor.to_out_lora.up.weight", "a.to_out.0", keys.UP),
        ("a.processor.img_to_q.lora_A.weight", "a.processor.img_to_q", keys.DOWN),
        ("a.b.lora_B.bias", "a.b", keys.BIAS),
        ("a.b.lora_magnitude_vector", "a.b", keys.MAGNITUDE),
        ("a.b.lora_magnitude_vector.default.weight", "a.b", keys.MAGNITUDE),
        ("a.b.alpha", "a.b", keys.ALPHA),
        ("a.b.lokr_w1_a", "a.b", "lokr_w1_a"),
        ("a.b.diff_b", "a.b", keys.BIAS),
    ],
)
def test_a_name_is_taken_apart(name, stem, what):
    assert keys.split(name) == (stem, what)


def test_other_names_are_no_part_of_a_lora():
    assert keys.split("a.weight") is None and keys.split("emb_params") is None


def test_every_line_of_the_vocabulary_has_its_numbers_on_both_sides():
    """# and * on the left and on the right are of one number, and no group is left unwritten."""
    for family, some in lines():
        for line in some:
            assert line.own.count("#") == line.theirs.count("#"), (family.title, line)
            assert line.own.endswith("*") == line.theirs.endswith("*") and line.own.count("*") <= 1
            assert not set("{}[]!~,= ") & set(line.own + line.theirs), line


def test_rows_of_parts():
    parts = (("q", False), ("k", False), ("v", False))
    assert [Line("", "", i, parts).rows((12, 8)) for i in range(3)] == [(0, 4), (4, 4), (8, 4)]
    grouped = (("q", True), ("k", False), ("v", False))
    assert [Line("", "", i, grouped).rows((16, 8)) for i in range(3)] == [(0, 8), (8, 4), (12, 4)]
    single = (("q", True), ("k", True), ("v", True), ("mlp", False))
    assert [Line("", "", i, single).rows((40, 8)) for i in range(4)] == [(0, 8), (8, 8), (16, 8), (24, 16)]


@pytest.mark.parametrize("prefix", ["", "base_model.model.", "diffusion_model.", "unet.base_model.model."])
def test_prefixes_say_nothing(prefix):
    names = Names({"blocks.10.cross_attn.k": (8, 8)})
    assert names.find(f"{prefix}blocks.10.attn2.to_k") == [Place("blocks.10.cross_attn.k")]
    assert names.find(f"{prefix}blocks.10.cross_attn.k") == [Place("blocks.10.cross_attn.k")]
    assert not names.find(f"{prefix}blocks.1.attn2.to_k")


def test_a_networks_own_names_come_before_those_of_other_families():
    """LTX has an attn1.to_q of its own, which means another layer in diffusers' Anima."""
    names = Names({"transformer_blocks.0.attn1.to_q": (8, 8), "blocks.0.self_attn.q_proj": (8, 8)})
    assert names.find("transformer.transformer_blocks.0.attn1.to_q")[0].layer == "transformer_blocks.0.attn1.to_q"


def test_gates_of_qwen_2_1_are_fused():
    """The maker's file has gate_layer and proj where the network has gate_up: rows of the first, then of the second."""
    layer = "transformer_blocks.0.img_mlp.gate_up"
    names = Names({layer: (12, 4)})
    stem = "transformer.transformer_blocks.0.img_mlp"
    state = {}
    for name in ("gate_layer", "proj"):
        state |= {f"{stem}.{name}.lora_A.weight": torch.randn(2, 4), f"{stem}.{name}.lora_B.weight": torch.randn(6, 2)}
    made = whole(read(state, names), {layer: 12})[layer]
    scale = float(made[keys.ALPHA]) / len(made[keys.DOWN])
    products = [state[f"{stem}.{n}.lora_B.weight"] @ state[f"{stem}.{n}.lora_A.weight"] for n in ("gate_layer", "proj")]
    assert torch.allclose(scale * made[keys.UP] @ made[keys.DOWN], torch.cat(products), atol=1e-6)


@pytest.mark.parametrize("alphas", [(2.0, 2.0), (2.0, 5.0), (None, 3.0)])
def test_parts_are_fused_exactly_whatever_their_alphas(alphas):
    layer, places = "layers.0.attention.qkv", ("to_q", "to_v")
    names, state, wanted = Names({layer: (24, 8)}), {}, torch.zeros(24, 8)
    for row, name, alpha in zip((0, 16), places, alphas, strict=True):
        down, up = torch.randn(3, 8).half(), torch.randn(8, 3).half()
        stem = f"layers.0.attention.{name}"
        state |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        if alpha is not None:
            state[f"{stem}.alpha"] = torch.tensor(alpha)
        wanted[row : row + 8] = (1.0 if alpha is None else alpha / 3) * up.float() @ down.float()
    made = whole(read(state, names), {layer: 24})[layer]
    scale = float(made[keys.ALPHA]) / len(made[keys.DOWN])
    assert torch.allclose(scale * made[keys.UP].float() @ made[keys.DOWN].float(), wanted, atol=1e-5)
    assert made[keys.DOWN].dtype == torch.float16


def test_parts_of_several_dtypes_are_fused_without_rounding():
    """The first part's dtype holds neither the numbers of the others nor their shared first half."""
    down, wide = torch.randn(2, 5).half(), torch.randn(3, 2)
    for first, second, kind in ((torch.float16, torch.float32, torch.float32), (torch.bfloat16, torch.float16, None)):
        parts = [(0, down.to(first), wide.to(first)), (3, down.to(second), wide.to(second))]
        for ordered in (parts, parts[::-1]):
            found, up = fused_pairs(ordered, 6)
            assert up.dtype == found.dtype == (kind or torch.float32)
            for row, a, b in ordered:
                assert torch.equal(up[row : row + 3].double() @ found.double(), b.double() @ a.double())
    layer = "layers.0.attention.qkv"
    values = [torch.randn(8, 8).half(), torch.randn(8, 8)]
    state = {f"layers.0.attention.{name}.diff": value for name, value in zip(("to_q", "to_k"), values, strict=True)}
    made = whole(read(state, Names({layer: (24, 8)})), {layer: 24})[layer][keys.DIFF]
    assert made.dtype == torch.float32 and torch.equal(made[:16], torch.cat([value.float() for value in values]))


def test_parts_that_share_their_first_half_keep_its_rank():
    down = torch.randn(2, 5)
    found, up = fused_pairs([(0, down, torch.ones(3, 2)), (3, down, 2 * torch.ones(3, 2))], 6)
    assert torch.equal(found, down) and torch.equal(up[:, 0], torch.tensor([1.0, 1, 1, 2, 2, 2]))


def test_what_cannot_be_fused_is_left_out_by_name():
    layer = "layers.0.attention.qkv"
    stem = "layers.0.attention"
    state = {
        f"{stem}.to_q.lokr_w1": torch.ones(2, 2), f"{stem}.to_q.lokr_w2": torch.ones(4, 4),
        f"{stem}.to_k.lora_A.weight": torch.ones(1, 8), f"{stem}.to_k.lora_B.weight": torch.ones(8, 1),
    }  # fmt: skip
    reading = read(state, Names({layer: (24, 8)}))
    made = whole(reading, {layer: 24})
    assert made[layer].keys() == {keys.DOWN, keys.UP, keys.ALPHA}
    assert set(reading.left) == {"layers.0.attention.to_q.lokr_w1", "layers.0.attention.to_q.lokr_w2"}


@pytest.mark.parametrize(
    ("stems", "titles", "own"),
    [
        (["transformer.blocks.0.attn2.to_k", "transformer.blocks.0.ffn.net.2"], ["Wan 2.1 or 2.2"], "blocks.0.ffn.2"),
        (["lora_unet_blocks_3_cross_attn_k"], ["Wan 2.1 or 2.2"], "blocks.3.cross_attn.k"),
        (["transformer_blocks.0.img_mlp.gate_layer"], ["Qwen-Image 2.1"], "transformer_blocks.0.img_mlp.gate_up"),
        (["unet.down_blocks.1.attentions.0.proj_in"], ["SD1.5 or SDXL"], "down_blocks.1.attentions.0.proj_in"),
        (["x.y"], [], None),
    ],
)
def test_without_a_network_the_family_is_told_by_the_names(stems, titles, own):
    found = placed_in(stems)
    assert [family.title for family, _ in found] == titles
    assert not found or found[0][1][stems[-1]][0] == own


def test_names_that_several_families_have_name_them_all():
    said = seems_for(["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"])
    assert "Flux" in said and "Qwen-Image" in said and "MiniMax-H3" in said
