"""NOISE of ours, made from the host's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..sampling.student_t import check_aug_dim, quantiles, student_t


class StudentTNoise:
    """NOISE with PFGM++'s heavy tails: the numbers of another NOISE, a random radius for each sample.

    base: has `seed` and `generate_noise(latent)`. aug_dim: D; 0 or infinity leaves the noise as it is.
    """

    def __init__(self, base: Any, aug_dim: float):
        check_aug_dim(aug_dim)
        self.base, self.seed, self.aug_dim = base, base.seed, aug_dim

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        """Noise for a LATENT; an item keeps its radius in whatever part of a batch it stands."""
        noise = self.base.generate_noise(latent)
        # Several latents in one (video with sound) are one sample, and have one radius.
        parts = noise.unbind() if noise.is_nested else [noise]
        items = latent.get("batch_index")
        radii = quantiles(self.seed, range(parts[0].shape[0]) if items is None else items)
        scaled = [student_t(part, radii, self.aug_dim) for part in parts]
        return type(noise)(scaled) if noise.is_nested else scaled[0]
