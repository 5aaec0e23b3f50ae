"""NOISE of ours, made from the host's own; as in core's, `seed` alone tells one draw from another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..sampling.find import Policy
from ..sampling.parts import Parts, parts_of
from ..sampling.student_t import check_aug_dim, quantiles, student_t

Plain = Callable[[int], Any]
"""`random_noise` of a host: seed -> core's NOISE."""


@dataclass
class StudentTNoise:
    """NOISE with PFGM++'s heavy tails: core's numbers, a random radius for each sample.

    aug_dim: D; 0 or infinity leaves the noise as it is. ValueError for what is no dimension.
    """

    plain: Plain
    seed: int
    aug_dim: float

    def __post_init__(self) -> None:
        check_aug_dim(self.aug_dim)

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        """Noise for a LATENT; an item keeps its radius in whatever part of a batch it stands."""
        noise = self.plain(self.seed).generate_noise(latent)
        # Several latents in one (video with sound) are one sample, and have one radius.
        parts = parts_of(noise)
        items = latent.get("batch_index")
        radii = quantiles(self.seed, range(parts[0].shape[0]) if items is None else items)
        scaled = [student_t(part, radii, self.aug_dim) for part in parts]
        return type(noise)(scaled) if noise.is_nested else scaled[0]


@dataclass
class PolicyNoise:
    """NOISE that FIND has learnt: core's numbers moved and scaled, by one policy for each item of a batch in turn."""

    policies: tuple[Policy, ...]
    plain: Plain
    seed: int

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        """Noise (B, ...) for a LATENT. ValueError for latents of another shape than the policies were learnt for."""
        unit = self.plain(self.seed).generate_noise(latent)
        packing = Parts.of(parts_of(unit))
        rows = packing.pack(parts_of(unit))
        shape, learnt = tuple(rows.shape[1:]), tuple(self.policies[0].mean.shape)
        if shape != learnt:
            raise ValueError(
                f"noise: the policy was learnt for latents of shape {learnt} and this one has {shape}; sample at the "
                "size that it was learnt at"
            )
        moved = torch.stack([self.policies[i % len(self.policies)].noise(row) for i, row in enumerate(rows)])
        return type(unit)(packing.unpack(moved)) if unit.is_nested else moved
