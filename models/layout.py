"""The embedded network: diffusers' SD3Transformer2DModel, three blocks of 192, and its SD3-layout file names.

Stock loaders read the SD3 layout (`joint_blocks.*`), diffusers its own. It converts one way, this file the other.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from . import autoencoder, text

DEPTH = 3
CONFIG = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": autoencoder.CHANNELS,
    "out_channels": autoencoder.CHANNELS,
    "num_layers": DEPTH,
    "attention_head_dim": 64,
    "num_attention_heads": DEPTH,
    "joint_attention_dim": text.WIDTH,
    "caption_projection_dim": 64 * DEPTH,
    "pooled_projection_dim": text.WIDTH,
    "pos_embed_max_size": 16,
    "qk_norm": "rms_norm",
}
_NAMES = (
    (r"^pos_embed\.pos_embed$", "pos_embed"),
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    (r"^time_text_embed\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"^time_text_embed\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"^time_text_embed\.text_embedder\.linear_1\.", "y_embedder.mlp.0."),
    (r"^time_text_embed\.text_embedder\.linear_2\.", "y_embedder.mlp.2."),
    (r"^proj_out\.", "final_layer.linear."),
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^transformer_blocks\.", "joint_blocks."),
    (r"\.norm1\.linear\.", ".x_block.adaLN_modulation.1."),
    (r"\.norm1_context\.linear\.", ".context_block.adaLN_modulation.1."),
    (r"\.ff\.net\.0\.proj\.", ".x_block.mlp.fc1."),
    (r"\.ff\.net\.2\.", ".x_block.mlp.fc2."),
    (r"\.ff_context\.net\.0\.proj\.", ".context_block.mlp.fc1."),
    (r"\.ff_context\.net\.2\.", ".context_block.mlp.fc2."),
    (r"\.attn\.norm_q\.", ".x_block.attn.ln_q."),
    (r"\.attn\.norm_k\.", ".x_block.attn.ln_k."),
    (r"\.attn\.norm_added_q\.", ".context_block.attn.ln_q."),
    (r"\.attn\.norm_added_k\.", ".context_block.attn.ln_k."),
    (r"\.attn\.to_out\.0\.", ".x_block.attn.proj."),
    (r"\.attn\.to_add_out\.", ".context_block.attn.proj."),
)
_FUSED = {"to_{}": "x_block", "add_{}_proj": "context_block"}
# diffusers keeps (scale, shift) in these two where the SD3 layout has (shift, scale).
_SWAPPED = re.compile(rf"^(final_layer|joint_blocks\.{DEPTH - 1}\.context_block)\.adaLN_modulation\.1\.")


def network() -> nn.Module:
    """A diffusers SD3 transformer of the embedded size (3.79 M parameters), randomly initialised."""
    from diffusers import SD3Transformer2DModel

    made: Any = SD3Transformer2DModel(**CONFIG)
    return made


def to_sd3_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename and fuse a diffusers state dict into the SD3 layout."""
    out = {}
    for name, value in state.items():
        if re.search(r"\.attn\.(to_[qkv]|add_[qkv]_proj)\.", name):
            continue
        for pattern, target in _NAMES:
            name = re.sub(pattern, target, name)
        if _SWAPPED.match(name):
            value = torch.cat(value.chunk(2)[::-1])
        out[name] = value
    for block in range(DEPTH):
        for pattern, stream in _FUSED.items():
            for end in ("weight", "bias"):
                parts = [state[f"transformer_blocks.{block}.attn.{pattern.format(p)}.{end}"] for p in "qkv"]
                out[f"joint_blocks.{block}.{stream}.attn.qkv.{end}"] = torch.cat(parts)
    return out


def from_sd3_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse, by diffusers' own converter."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    return convert_sd3_transformer_checkpoint_to_diffusers(dict(state))
