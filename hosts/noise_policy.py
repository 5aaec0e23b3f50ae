"""NOISE that a search by FIND has learnt, which any sampler takes in place of Random Noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..sampling.find import Policy


@dataclass
class PolicyNoise:
    """Draws of one policy for each item of a batch, over and over; `unit` gives what Random Noise would.

    seed: tells one draw from another, as in core's NOISE.
    """

    policies: tuple[Policy, ...]
    unit: Callable[[dict[str, Any], int], Tensor]
    seed: int

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        """Unit noise (B, ...) for a LATENT, moved and scaled. ValueError for latents of another shape."""
        shape = tuple(latent["samples"].shape[1:])
        learnt = tuple(self.policies[0].mean.shape)
        if shape != learnt:
            raise ValueError(
                f"noise: the policy was learnt for latents of shape {learnt} and this one has {shape}; sample at the "
                "size that it was learnt at"
            )
        unit = self.unit(latent, self.seed)
        rows = [self.policies[i % len(self.policies)].noise(row) for i, row in enumerate(unit)]
        return torch.stack(rows)
