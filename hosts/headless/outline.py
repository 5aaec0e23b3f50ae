"""A headless MODEL without weights, for a dry run: its network's own modules, and not a byte of its file."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...trainers.decoder import Decoder
from ...trainers.weightless import META, weightless_copy
from .model import Model, Vae
from .training import HeadlessDenoiser


class Outline:
    """See `trainers.dry_run.Outline`. compute: see `hosts.api.trainable`."""

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
    """See `hosts.api`."""
    network = weightless_copy(vae.network())

    def decode(latents: Tensor) -> Tensor:
        return vae.decodes(network, latents).movedim(1, -1)

    return Decoder(network, decode)
