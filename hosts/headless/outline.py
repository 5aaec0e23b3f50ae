"""A headless MODEL without weights, for a dry run: its network's own modules, and not a byte of its file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...trainers.decoder import Decoder
from ...trainers.weightless import META, weightless_copy
from .model import Model, Vae
from .training import HeadlessDenoiser


class Outline:
    """See `trainers.dry_run.Outline`. compute: see `hosts.contract.Training.trainable`."""

    def __init__(self, model: Model, compute: torch.dtype | None = None):
        self._model, self._compute = model, compute
        self._made: Any = model.source.bare()
        self.network: nn.Module = weightless_copy(self._made.module)

    def denoiser(self, network: nn.Module) -> HeadlessDenoiser:
        """See the contract."""
        known = {id(tensor): tensor for tensor in (*self._made.module.parameters(), *self._made.module.buffers())}
        made = copy.deepcopy(self._made, {**known, id(self._made.module): network})
        made.device = META
        return HeadlessDenoiser(self._model, self._compute, made)


def outlined_decoder(vae: Vae) -> Decoder:
    """See `hosts.contract`."""
    network = weightless_copy(vae.network())

    def decode(latents: Tensor) -> Tensor:
        return vae.decodes(network, latents).movedim(1, -1)

    return Decoder(network, decode)


# Tokens that a family's text encoders make of a prompt of usual length, by the width of their tokens.
_LENGTHS = {768: 77, 2048: 77, 4096: 512}


def from_header(path: Path, width: int, height: int, frames: int = 1, tokens: int = 0) -> Any:
    """See `hosts.contract`."""
    from .diffusers_folder import Folder
    from .diffusers_loader import load_diffusion_model
    from .families import require_diffusers

    require_diffusers()
    model = Folder(path).model() if path.is_dir() else load_diffusion_model(path)
    if frames != 1:
        raise ValueError("frames: videos are counted with --comfyui alone")
    settings: Any = model.source.bare().module.config
    wide = settings.get("joint_attention_dim") or settings["cross_attention_dim"]
    pooled = settings.get("pooled_projection_dim")
    if settings.get("addition_embed_type") == "text_time":
        pooled = settings["projection_class_embeddings_input_dim"] - 6 * settings["addition_time_embed_dim"]
    length = tokens or (154 if "pos_embed_max_size" in settings else _LENGTHS.get(wide, 256))
    entry = torch.zeros(1, length, wide), {"pooled_output": torch.zeros(1, pooled)} if pooled else {}
    side = model.latent.downscale
    return model, entry, (model.latent.channels, height // side, width // side)
