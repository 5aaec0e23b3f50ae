"""NOISE of the headless host: the same numbers as ComfyUI's for the same seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def prepare_noise(latent: Tensor, seed: int, batch_index: list[int] | None = None) -> Tensor:
    """Unit noise of a latent's shape from one CPU generator.

    batch_index: which item of the seed's stream each item of the batch is, so that a part of a batch gets the noise
    that it had in the whole.
    """
    generator = torch.manual_seed(seed)
    if batch_index is None:
        return torch.randn(latent.shape, generator=generator).to(latent.dtype)
    wanted = set(batch_index)
    drawn = {}
    for i in range(max(wanted) + 1):
        one = torch.randn(1, *latent.shape[1:], generator=generator)
        if i in wanted:
            drawn[i] = one
    return torch.cat([drawn[i] for i in batch_index]).to(latent.dtype)


@dataclass(frozen=True)
class RandomNoise:
    """NOISE drawn from a seed."""

    seed: int

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        """Noise for a LATENT."""
        return prepare_noise(latent["samples"], self.seed, latent.get("batch_index"))


@dataclass(frozen=True)
class NoNoise:
    """NOISE of zeros, for a latent that already carries its own."""

    seed: int = 0

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        """Zeros for a LATENT."""
        return torch.zeros_like(latent["samples"], device="cpu")
