"""Stable Diffusion's autoencoder: the latent-diffusion file layout and diffusers' AutoencoderKL."""

from __future__ import annotations

from typing import Any

from .renames import Layout, count

Shapes = dict[str, tuple[int, ...]]
_RESNET = tuple((p, p) for p in ("norm1", "conv1", "norm2", "conv2")) + (("nin_shortcut", "conv_shortcut"),)
_ATTENTION = (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))


def is_vae(shapes: Shapes) -> bool:
    """Whether the names are an autoencoder's in the latent-diffusion layout."""
    return "encoder.conv_in.weight" in shapes and "decoder.up.0.block.0.conv1.weight" in shapes


def config(shapes: Shapes) -> dict[str, Any]:
    """AutoencoderKL's arguments, read from tensor shapes."""
    levels = count(shapes, "encoder.down.")
    widths = [shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in range(levels)]
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "layers_per_block": count(shapes, "encoder.down.0.block."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def layout(config: Any) -> Layout:
    """The table for an AutoencoderKL's config."""
    table = Layout()
    levels, per = len(config["block_out_channels"]), config["layers_per_block"]
    table.add_all("", "", ((p, p) for p in ("quant_conv", "post_quant_conv")))
    for side in ("encoder.", "decoder."):
        ends = (("conv_in", "conv_in"), ("conv_out", "conv_out"), ("norm_out", "conv_norm_out"))
        table.add_all(side, side, ends)
        for i in (1, 2):
            table.add_all(f"{side}mid.block_{i}.", f"{side}mid_block.resnets.{i - 1}.", _RESNET)
        attention = f"{side}mid.attn_1."
        table.add_all(attention, f"{side}mid_block.attentions.0.", _ATTENTION)
        table.flat |= {f"{attention}{p}" for p in ("q", "k", "v", "proj_out")}
    for i in range(levels):
        for j in range(per):
            table.add_all(f"encoder.down.{i}.block.{j}.", f"encoder.down_blocks.{i}.resnets.{j}.", _RESNET)
        table.add(f"encoder.down.{i}.downsample.conv", f"encoder.down_blocks.{i}.downsamplers.0.conv")
        # The file counts the decoder's levels from the finest, diffusers from the coarsest.
        k = levels - 1 - i
        for j in range(per + 1):
            table.add_all(f"decoder.up.{i}.block.{j}.", f"decoder.up_blocks.{k}.resnets.{j}.", _RESNET)
        table.add(f"decoder.up.{i}.upsample.conv", f"decoder.up_blocks.{k}.upsamplers.0.conv")
    return table
