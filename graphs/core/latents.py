"""Core's latent nodes: empty ones, batches, masks, and the VAE."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...hosts.headless.model import Vae
from ..api import io
from .declare import core_node

MAX_SIDE = 16384


def _empty(cls_channels: int, width: int, height: int, batch_size: int):
    samples = torch.zeros(batch_size, cls_channels, height // 8, width // 8)
    return io.NodeOutput({"samples": samples, "downscale_ratio_spacial": 8})


@core_node(
    display_name="Empty Latent Image",
    category="model/latent",
    inputs=[
        io.Int.Input("width", default=512, min=16, max=MAX_SIDE, step=8, tooltip="In pixels."),
        io.Int.Input("height", default=512, min=16, max=MAX_SIDE, step=8, tooltip="In pixels."),
        io.Int.Input("batch_size", default=1, min=1, max=4096),
    ],
    outputs=[io.Latent.Output()],
)
def EmptyLatentImage(width, height, batch_size=1):
    """Empty latents; a model with other channels takes them too."""
    return _empty(4, width, height, batch_size)


@core_node(
    category="model/latent/stable diffusion",
    inputs=[
        io.Int.Input("width", default=1024, min=16, max=MAX_SIDE, step=16, tooltip="In pixels."),
        io.Int.Input("height", default=1024, min=16, max=MAX_SIDE, step=16, tooltip="In pixels."),
        io.Int.Input("batch_size", default=1, min=1, max=4096),
    ],
    outputs=[io.Latent.Output()],
)
def EmptySD3LatentImage(width, height, batch_size=1):
    """Empty latents of 16 channels."""
    return _empty(16, width, height, batch_size)


def _mask_rows(mask: Tensor, batch: int) -> Tensor:
    """A mask batch repeated to at least the latents' batch."""
    return mask.repeat(math.ceil(batch / mask.shape[0]), *(1,) * (mask.ndim - 1))[:batch]


@core_node(
    display_name="Repeat Latent Batch",
    category="model/latent/batch",
    inputs=[io.Latent.Input("samples"), io.Int.Input("amount", default=1, min=1, max=64)],
    outputs=[io.Latent.Output()],
)
def RepeatLatentBatch(samples: dict[str, Any], amount: int):
    """The whole batch several times over."""
    latent = samples["samples"]
    out = {**samples, "samples": latent.repeat(amount, *(1,) * (latent.ndim - 1))}
    mask = samples.get("noise_mask")
    if mask is not None and mask.shape[0] > 1:
        out["noise_mask"] = mask.repeat(amount, *(1,) * (mask.ndim - 1))
    index = samples.get("batch_index")
    if index is not None:
        span = max(index) - min(index) + 1
        out["batch_index"] = [i + span * k for k in range(amount) for i in index]
    return io.NodeOutput(out)


@core_node(
    display_name="Get Latent From Batch",
    category="model/latent/batch",
    inputs=[
        io.Latent.Input("samples"),
        io.Int.Input("batch_index", default=0, min=-MAX_SIDE, max=MAX_SIDE),
        io.Int.Input("length", default=1, min=1, max=64),
    ],
    outputs=[io.Latent.Output()],
)
def LatentFromBatch(samples: dict[str, Any], batch_index: int, length: int):
    """Part of a batch, which keeps the noise that it would have had in the whole."""
    latent = samples["samples"]
    batch = latent.shape[0]
    first = max(0, min(batch - 1, batch_index + batch if batch_index < 0 else batch_index))
    rows = slice(first, min(batch, first + length))
    out = {**samples, "samples": latent[rows].clone()}
    mask = samples.get("noise_mask")
    if mask is not None:
        out["noise_mask"] = mask.clone() if mask.shape[0] == 1 else _mask_rows(mask, batch)[rows].clone()
    out["batch_index"] = list(samples.get("batch_index", range(batch)))[rows]
    return io.NodeOutput(out)


@core_node(
    display_name="Set Latent Noise Mask",
    category="model/latent",
    inputs=[io.Latent.Input("samples"), io.Mask.Input("mask")],
    outputs=[io.Latent.Output()],
)
def SetLatentNoiseMask(samples: dict[str, Any], mask: Tensor):
    """Sampling changes the latent only where the mask is 1."""
    return io.NodeOutput({**samples, "noise_mask": mask.reshape(-1, 1, *mask.shape[-2:])})


@core_node(
    display_name="VAE Encode",
    category="model/latent",
    inputs=[io.Image.Input("pixels"), io.Vae.Input("vae")],
    outputs=[io.Latent.Output()],
)
def VAEEncode(pixels: Tensor, vae: Vae):
    """Images to latents."""
    return io.NodeOutput({"samples": vae.encode(pixels)})


@core_node(
    display_name="VAE Decode",
    category="model/latent",
    inputs=[io.Latent.Input("samples"), io.Vae.Input("vae")],
    outputs=[io.Image.Output()],
)
def VAEDecode(samples: dict[str, Any], vae: Vae):
    """Latents to images."""
    return io.NodeOutput(vae.decode(samples["samples"]))


NODES = [
    EmptyLatentImage,
    EmptySD3LatentImage,
    RepeatLatentBatch,
    LatentFromBatch,
    SetLatentNoiseMask,
    VAEEncode,
    VAEDecode,
]
