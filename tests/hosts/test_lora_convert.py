"""`retort lora convert`: one file under the names that loaders have in common, without the model or with its header."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from retort.hosts.cli import app
from retort.hosts.lora_convert import Rows, convert

QKV = ("to_q", "to_k", "to_v")


def pair(stem, rows, columns, rank=2, ends=(".lora_A.weight", ".lora_B.weight"), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {stem + ends[0]: torch.randn(rank, columns, generator=generator),
            stem + ends[1]: torch.randn(rows, rank, generator=generator)}  # fmt: skip


def product(state, stem):
    """What a file's pair adds to its layer."""
    ends = (".lora_down.weight", ".lora_up.weight") if f"{stem}.lora_down.weight" in state else (
        ".lora_A.weight", ".lora_B.weight",
    )  # fmt: skip
    down, up = (state[stem + end] for end in ends)
    alpha = float(state.get(f"{stem}.alpha", len(down)))
    return alpha / len(down) * up @ down


def converted(tmp_path, state, metadata=None, **given):
    save_file(state, tmp_path / "a.safetensors", metadata)
    made = convert(tmp_path / "a.safetensors", None, given.get("model"), given.get("alpha"), given.get("rows"))
    with safe_open(made.path, "pt") as file:
        return load_file(made.path), file.metadata(), made.told


def test_wan_from_diffusers_names(tmp_path):
    """The names change, the weights and the metadata do not, and the alpha that all loaders read is written."""
    state = pair("transformer.blocks.0.attn2.to_k", 8, 6) | pair("transformer.blocks.1.ffn.net.0.proj", 9, 8)
    found, metadata, told = converted(tmp_path, state, {"by": "x", "lora_adapter_metadata": "{}"})
    assert torch.equal(found["diffusion_model.blocks.0.cross_attn.k.lora_up.weight"],
                       state["transformer.blocks.0.attn2.to_k.lora_B.weight"])  # fmt: skip
    assert float(found["diffusion_model.blocks.1.ffn.0.alpha"]) == 2 and len(found) == 6
    assert metadata == {"by": "x", "retort.converted_from": "a.safetensors"}
    assert len(told) == 1 and "no alpha" in told[0]


def test_parts_of_z_image_are_fused_without_the_model(tmp_path):
    stem = "lora_unet_layers_0_attention_"
    state = {}
    for i, name in enumerate(QKV):
        state |= pair(stem + name, 6, 6, ends=(".lora_down.weight", ".lora_up.weight"), seed=i)
        state[f"{stem}{name}.alpha"] = torch.tensor(1.0 + i)
    state |= pair("lora_unet_layers_0_feed_forward_w1", 4, 6, ends=(".lora_down.weight", ".lora_up.weight"))
    found, _, told = converted(tmp_path, state)
    fused = product(found, "diffusion_model.layers.0.attention.qkv")
    assert torch.allclose(fused, torch.cat([product(state, stem + name) for name in QKV]), atol=1e-6)
    assert "diffusion_model.layers.0.feed_forward.w1.lora_up.weight" in found and not told


def test_a_part_that_is_missing_has_the_size_of_the_others(tmp_path):
    state = pair("transformer.layers.0.attention.to_k", 6, 6) | pair("transformer.layers.0.attention.to_out.0", 6, 6)
    found, _, _ = converted(tmp_path, state)
    fused = product(found, "diffusion_model.layers.0.attention.qkv")
    assert fused.shape == (18, 6)
    assert torch.allclose(fused[6:12], product(state, "transformer.layers.0.attention.to_k"), atol=1e-6)
    assert not fused[:6].any() and not fused[12:].any()


def test_grouped_queries_need_the_model_where_no_key_tells_its_size(tmp_path):
    state = pair("layers.0.attention.to_q", 8, 8) | pair("layers.0.attention.to_out.0", 8, 8)
    with pytest.raises(ValueError, match="no part that tells how large the others are: give .* with --model"):
        converted(tmp_path, state)
    model = tmp_path / "model.safetensors"
    save_file({"model.diffusion_model.layers.0.attention.qkv.weight": torch.zeros(16, 8),
               "model.diffusion_model.layers.0.attention.out.weight": torch.zeros(8, 8)}, model)  # fmt: skip
    found, _, _ = converted(tmp_path, state, model=model)
    fused = product(found, "diffusion_model.layers.0.attention.qkv")
    assert fused.shape == (16, 8) and torch.allclose(fused[:8], product(state, "layers.0.attention.to_q"), atol=1e-6)


def test_names_of_several_families_need_the_model(tmp_path):
    state, ends = {}, (".lora_A.default.weight", ".lora_B.default.weight")
    for name in QKV:
        state |= pair(f"transformer_blocks.0.attn.{name}", 6, 4, ends=ends)
    with pytest.raises(ValueError, match="may be of MiniMax-H3 or .* Qwen-Image.*--model"):
        converted(tmp_path, state)
    model = tmp_path / "model.safetensors"
    save_file({"blocks.0.attn.qkv_proj.weight": torch.zeros(18, 4)}, model)
    found, _, _ = converted(tmp_path, state, model=model, alpha=1.0)
    assert set(found) == {f"diffusion_model.blocks.0.attn.qkv_proj.{end}" for end in
                          ("lora_down.weight", "lora_up.weight", "alpha")}  # fmt: skip
    plain = state["transformer_blocks.0.attn.to_q.lora_B.default.weight"]
    plain = plain @ state["transformer_blocks.0.attn.to_q.lora_A.default.weight"]
    assert torch.allclose(product(found, "diffusion_model.blocks.0.attn.qkv_proj")[:6], 0.5 * plain, atol=1e-6)


def test_unets_get_kohyas_names_and_flux_keeps_diffusers(tmp_path):
    text = {"text_encoder.x.lora_A.weight": torch.ones(1, 2), "text_encoder.x.lora_B.weight": torch.ones(2, 1)}
    found, _, _ = converted(tmp_path, pair("unet.down_blocks.0.attentions.0.proj_in", 4, 4) | text)
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    assert set(found) == {f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha", *text}
    for path in tmp_path.iterdir():
        path.unlink()
    stem = "single_transformer_blocks.0.attn.to_qkv_mlp_proj"
    found, _, _ = converted(tmp_path, pair(f"base_model.model.{stem}", 4, 4))
    assert set(found) == {f"transformer.{stem}.{end}" for end in ("lora_A.weight", "lora_B.weight", "alpha")}


def test_what_has_no_place_is_said_and_files_are_never_overwritten(tmp_path):
    state = pair("blocks.0.cross_attn.k", 8, 8) | pair("blocks.0.cross_attn.q", 8, 8) | pair("odd.layer", 3, 3)
    file = tmp_path / "x.safetensors"
    save_file(state, file)
    outcome = CliRunner().invoke(app, ["lora", "convert", str(file)])
    assert outcome.exit_code == 0 and str(tmp_path / "x_converted.safetensors") in outcome.output
    assert "2 tensors of the LoRA are left out ('odd.layer.lora_A.weight', 'odd.layer.lora_B.weight'" in outcome.output
    again = CliRunner().invoke(app, ["lora", "convert", str(file)])
    assert again.exit_code == 2 and "is there already: choose another name with --out" in again.output


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"PK\x03\x04 a list of tensors", "is a pickle"),
        (b"nothing", "is not a whole safetensors file"),
        ({"a.weight": torch.ones(2)}, "holds no tensors of a LoRA"),
        (pair("some.layer", 2, 2), "are of no family that is known"),
        (pair("blocks.0.cross_attn.k", 4, 4) | {"blocks.0.cross_attn.k.alpha": torch.ones(2)}, "is no number"),
        (pair("blocks.0.cross_attn.k", 4, 4) | {"blocks.0.ffn.0.lora_A.weight": torch.ones(2, 4)}, "no second half"),
        (pair("blocks.0.cross_attn.k", 4, 4, rank=0), "another size"),
    ],
)
def test_other_files_are_refused_and_nothing_is_written(tmp_path, content, says):
    file = tmp_path / "x.ckpt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        save_file(content, file)
    with pytest.raises(ValueError, match=says):
        convert(file, None, None, None)
    assert list(tmp_path.iterdir()) == [file]


def test_h3_from_diffsynth_is_converted_once_its_user_says_how_its_rows_lie(tmp_path):
    """Two heads: MiniMax's own files have query, key and value of the first, then of the second."""
    stem, ends = "blocks.0.attn.qkv_proj", (".lora_A.default.weight", ".lora_B.default.weight")
    state = pair(stem, 2 * 3 * 128, 6, ends=ends) | pair("blocks.0.attn.out_proj", 6, 256, ends=ends)
    with pytest.raises(ValueError, match="blocks.0.attn.qkv_proj .* rows in two orders: .*--rows heads .*--rows parts"):
        converted(tmp_path, state)
    (tmp_path / "a_converted.safetensors").unlink(missing_ok=True)
    added = state[stem + ends[1]] @ state[stem + ends[0]]
    own = f"diffusion_model.{stem}"
    found, _, _ = converted(tmp_path, state, rows=Rows.PARTS)
    assert torch.allclose(product(found, own), added, atol=1e-6)
    (tmp_path / "a_converted.safetensors").unlink()
    found, _, _ = converted(tmp_path, state, rows=Rows.HEADS)
    heads = [added[128 * i : 128 * (i + 1)] for i in range(6)]  # q k v of the first, q k v of the second
    assert torch.allclose(product(found, own), torch.cat([heads[i] for i in (0, 3, 1, 4, 2, 5)]), atol=1e-6)
    assert "diffusion_model.blocks.0.attn.out_proj.lora_up.weight" in found
    (tmp_path / "a_converted.safetensors").unlink()
    with pytest.raises(ValueError, match="--rows is for MiniMax-H3's LoRAs"):
        converted(tmp_path, pair("transformer.blocks.0.attn2.to_k", 8, 6), rows=Rows.HEADS)


def test_the_command_takes_the_order_of_rows(tmp_path):
    ends = (".lora_A.default.weight", ".lora_B.default.weight")
    file = tmp_path / "h3.safetensors"
    save_file(pair("blocks.0.attn.qkv_proj", 384, 6, ends=ends), file)
    assert CliRunner().invoke(app, ["lora", "convert", str(file)]).exit_code == 2
    assert CliRunner().invoke(app, ["lora", "convert", str(file), "--rows", "heads"]).exit_code == 0


def test_magnitudes_of_peft_have_no_common_name(tmp_path):
    state = pair("transformer.blocks.0.attn2.to_k", 8, 6)
    state["transformer.blocks.0.attn2.to_k.lora_magnitude_vector"] = torch.ones(8)
    with pytest.raises(ValueError, match="magnitudes of PEFT's DoRA .transformer.blocks.0.attn2.to_k.lora_magnitude"):
        converted(tmp_path, state)
