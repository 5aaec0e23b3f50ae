"""The embedded network: diffusers' SD3Transformer2DModel, three blocks of 192, and its SD3-layout file names.

Stock loaders read the SD3 layout (`joint_blocks.*`), diffusers its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import autoencoder, text
from .layouts.dit import sd3_layout

DEPTH = 3
CONFIG: dict[str, Any] = {
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
TABLE = sd3_layout(CONFIG)


def network() -> nn.Module:
    """A diffusers SD3 transformer of the embedded size (3.79 M parameters), randomly initialised."""
    from diffusers import SD3Transformer2DModel

    made: Any = SD3Transformer2DModel(**CONFIG)
    return made


def refuse_large(height: int, width: int) -> None:
    """ValueError for latents that have more places than the network knows."""
    most = CONFIG["pos_embed_max_size"] * CONFIG["patch_size"]
    if max(height, width) > most:
        raise ValueError(
            f"the demo model draws pictures of 64 x 64 pixels, {8 * most} x {8 * most} at most, and these are "
            f"{8 * width} x {8 * height}: set width and height of the empty latent to 64"
        )


def to_sd3_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A diffusers state dict under the names of the SD3 layout, with query, key and value in one tensor."""
    return TABLE.restore(state)


def from_sd3_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse. ValueError for tensors that the network lacks."""
    converted, unknown = TABLE.convert(state)
    if unknown:
        raise ValueError(f"the embedded network has no tensor {unknown[0]}")
    return converted
