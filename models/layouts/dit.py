"""SD3's and Flux's transformers: the published file layouts and diffusers' classes."""

from __future__ import annotations

from typing import Any

from .renames import Layout, count

Shapes = dict[str, tuple[int, ...]]
_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_SD3_ENDS = (
    ("pos_embed", "pos_embed.pos_embed"), ("x_embedder.proj", "pos_embed.proj"),
    ("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
    ("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
    ("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
    ("context_embedder", "context_embedder"), ("final_layer.linear", "proj_out"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear"),
)  # fmt: skip
_SD3_BLOCK = (
    ("x_block.attn.proj", "attn.to_out.0"), ("context_block.attn.proj", "attn.to_add_out"),
    ("x_block.attn.ln_q", "attn.norm_q"), ("x_block.attn.ln_k", "attn.norm_k"),
    ("context_block.attn.ln_q", "attn.norm_added_q"), ("context_block.attn.ln_k", "attn.norm_added_k"),
    ("x_block.attn2.proj", "attn2.to_out.0"), ("x_block.attn2.ln_q", "attn2.norm_q"),
    ("x_block.attn2.ln_k", "attn2.norm_k"), ("x_block.adaLN_modulation.1", "norm1.linear"),
    ("context_block.adaLN_modulation.1", "norm1_context.linear"), ("x_block.mlp.fc1", "ff.net.0.proj"),
    ("x_block.mlp.fc2", "ff.net.2"), ("context_block.mlp.fc1", "ff_context.net.0.proj"),
    ("context_block.mlp.fc2", "ff_context.net.2"),
)  # fmt: skip


def is_sd3(shapes: Shapes) -> bool:
    """Whether the names are an SD3 transformer's."""
    return "joint_blocks.0.x_block.attn.qkv.weight" in shapes


def sd3_config(shapes: Shapes) -> dict[str, Any]:
    """SD3Transformer2DModel's arguments, read from tensor shapes; heads are 64 wide in every SD3."""
    width, context = shapes["context_embedder.weight"]
    channels, patch = shapes["x_embedder.proj.weight"][1:3]
    layers = count(shapes, "joint_blocks.")
    positions = round(shapes["pos_embed"][1] ** 0.5)
    return {
        "sample_size": positions * patch,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "num_layers": layers,
        "attention_head_dim": 64,
        "num_attention_heads": width // 64,
        "joint_attention_dim": context,
        "caption_projection_dim": width,
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": positions,
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in shapes else None,
        "dual_attention_layers": tuple(
            i for i in range(layers) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes
        ),
    }


def sd3_layout(config: Any) -> Layout:
    """The table for an SD3Transformer2DModel's config."""
    table = Layout()
    table.add_all("", "", _SD3_ENDS)
    last = config["num_layers"] - 1
    for i in range(config["num_layers"]):
        original, block = f"joint_blocks.{i}.", f"transformer_blocks.{i}."
        table.add_all(original, block, _SD3_BLOCK)
        table.add(f"{original}x_block.attn.qkv", *(block + p for p in _QKV))
        table.add(f"{original}context_block.attn.qkv", *(block + p for p in _ADDED))
        table.add(f"{original}x_block.attn2.qkv", *(block + p.replace("attn.", "attn2.") for p in _QKV))
    table.swapped = {"final_layer.adaLN_modulation.1", f"joint_blocks.{last}.context_block.adaLN_modulation.1"}
    return table


_FLUX_ENDS = (
    ("img_in", "x_embedder"), ("txt_in", "context_embedder"), ("final_layer.linear", "proj_out"),
    ("final_layer.adaLN_modulation.1", "norm_out.linear"),
    *(
        (f"{name}_in.{side}_layer", f"time_text_embed.{target}_embedder.linear_{n}")
        for name, target in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
        for n, side in ((1, "in"), (2, "out"))
    ),
)  # fmt: skip
_FLUX_DOUBLE = (
    ("img_mod.lin", "norm1.linear"), ("txt_mod.lin", "norm1_context.linear"),
    ("img_attn.norm.query_norm", "attn.norm_q"), ("img_attn.norm.key_norm", "attn.norm_k"),
    ("txt_attn.norm.query_norm", "attn.norm_added_q"), ("txt_attn.norm.key_norm", "attn.norm_added_k"),
    ("img_attn.proj", "attn.to_out.0"), ("txt_attn.proj", "attn.to_add_out"), ("img_mlp.0", "ff.net.0.proj"),
    ("img_mlp.2", "ff.net.2"), ("txt_mlp.0", "ff_context.net.0.proj"), ("txt_mlp.2", "ff_context.net.2"),
)  # fmt: skip
_FLUX_SINGLE = (
    ("modulation.lin", "norm.linear"), ("norm.query_norm", "attn.norm_q"), ("norm.key_norm", "attn.norm_k"),
    ("linear2", "proj_out"),
)  # fmt: skip


def is_flux(shapes: Shapes) -> bool:
    """Whether the names are a Flux transformer's."""
    # HunyuanVideo has blocks and a pooled text like these; its latents enter by a convolution, `img_in.proj`.
    named = ("double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight", "img_in.weight")
    return all(name in shapes for name in named)


def flux_config(shapes: Shapes) -> dict[str, Any]:
    """FluxTransformer2DModel's arguments, read from tensor shapes; heads are 128 wide in every Flux."""
    width, channels = shapes["img_in.weight"]
    return {
        "in_channels": channels,
        "num_layers": count(shapes, "double_blocks."),
        "num_single_layers": count(shapes, "single_blocks."),
        "attention_head_dim": 128,
        "num_attention_heads": width // 128,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
    }


def flux_layout(config: Any) -> Layout:
    """The table for a FluxTransformer2DModel's config."""
    table = Layout()
    table.add_all("", "", _FLUX_ENDS)
    width = config["attention_head_dim"] * config["num_attention_heads"]
    for i in range(config["num_layers"]):
        original, block = f"double_blocks.{i}.", f"transformer_blocks.{i}."
        table.add_all(original, block, _FLUX_DOUBLE)
        table.add(f"{original}img_attn.qkv", *(block + p for p in _QKV))
        table.add(f"{original}txt_attn.qkv", *(block + p for p in _ADDED))
    for i in range(config["num_single_layers"]):
        original, block = f"single_blocks.{i}.", f"single_transformer_blocks.{i}."
        table.add_all(original, block, _FLUX_SINGLE)
        table.add(f"{original}linear1", *(block + p for p in (*_QKV, "proj_mlp")))
        table.rows[f"{original}linear1"] = (width, width, width, 4 * width)
    table.swapped = {"final_layer.adaLN_modulation.1"}
    return table
