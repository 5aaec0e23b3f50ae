"""Guides x0 towards the amplitude spectrum and the local structure of a reference.

After Li et al. 2025, DifIISR (arXiv 2503.01187), which injects the gradients of a thermal spectrum prior and of visual
foundation models into the reverse process. Its formulas and code are not public, so the formula here is ours:

    L(x) = f || log(1 + |F x|) - log(1 + |F r|) ||_1 + p / 2 || phi(x) - phi(r) ||^2,     x0 <- x0 - s grad L(x0)

F is the orthonormal 2-D Fourier transform of each channel and frame, r the reference, and phi a pyramid of what three
smoothings take away, in place of a network's features. Both gradients are written out, so that none is recorded. The
amplitude does not know where anything lies (a shifted reference is as good); phi does. phi never enlarges, so with
s p <= 1 the second part never overshoots; the amplitude's gradient is at most f at each frequency, whatever the size
of the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..sampling.settings import Settings, setting

_LEVELS = 3


@dataclass(frozen=True)
class SpectralConfig(Settings):
    """scale: s. spectrum: f. structure: p. first, last: levels between which x0 is guided, both included."""

    scale: float = setting(0.5, 0, 100, step=0.05, round=0.001, remedy="0 is none of it",
        help="How far a step goes; 0: off.", page="s, how far each step goes; 0 is off.")
    spectrum: float = setting(0.2, 0, 100, step=0.05, round=0.001, remedy="0 is none of it",
        help="Weight of the amplitudes, which do not know where anything lies.",
        page="f, weight of the amplitudes. They do not know where anything lies, so a shifted reference is as good.")
    structure: float = setting(0.5, 0, 100, step=0.05, round=0.001, remedy="0 is none of it",
        help="Weight of the local structure: edges where the reference has them.",
        page="p, weight of the local structure, which knows. s times p above 1 overshoots.")
    first: float = math.inf
    last: float = 0.0

    def check(self) -> None:
        """See the base."""
        if not 0 <= self.last <= self.first:
            raise ValueError(
                f"the guided range ends at level {self.last:g}, above its start {self.first:g}: let start_percent be "
                "below end_percent"
            )


def amplitude_loss(x: Tensor, reference: Tensor) -> Tensor:
    """(B,): the norm that f weighs, for latents (B, C, ..., H, W)."""
    change = torch.log1p(_spectrum(x).abs()) - torch.log1p(_spectrum(reference).abs())
    return change.abs().flatten(1).sum(1)


def amplitude_gradient(x: Tensor, reference: Tensor) -> Tensor:
    """The gradient of `amplitude_loss` in x, of its shape; 0 where an amplitude is 0 or equal to the reference's."""
    own = _spectrum(x)
    amplitude = own.abs()
    side = torch.sign(torch.log1p(amplitude) - torch.log1p(_spectrum(reference).abs()))
    # F is unitary, so its adjoint is its inverse. The phase of nothing is nothing.
    phase = own / amplitude.clamp_min(torch.finfo(amplitude.dtype).tiny)
    return torch.fft.ifft2(side / (1 + amplitude) * phase, norm="ortho").real


def structure_loss(x: Tensor, reference: Tensor) -> Tensor:
    """(B,): half the square that p weighs; phi is linear, so that the difference alone counts."""
    return torch.stack([part.square().flatten(1).sum(1) for part in pyramid(x - reference)]).sum(0) / 2


def structure_gradient(x: Tensor, reference: Tensor) -> Tensor:
    """The gradient of `structure_loss` in x, of its shape."""
    # Each part is a symmetric filter, applied once more: its adjoint is itself.
    return torch.stack([pyramid(part)[i] for i, part in enumerate(pyramid(x - reference))]).sum(0)


def pyramid(x: Tensor) -> list[Tensor]:
    """phi(x): what smoothing with gaps of 1, 2 and 4 cells takes away one after another, the border wrapped around."""
    parts = []
    for level in range(_LEVELS):
        smooth = x
        for dim in (-2, -1):
            both = smooth.roll(2**level, dim) + smooth.roll(-(2**level), dim)
            smooth = smooth / 2 + both / 4
        parts.append(x - smooth)
        x = smooth
    return parts


def guided(x0: Tensor, reference: Tensor, sigma: float, config: SpectralConfig) -> Tensor:
    """x0 (B, C, ..., H, W) after one step of guidance at level sigma; in fp32, given back in x0's dtype.

    reference: clean, in the model's scale, (B, ...) or (1, ...). ValueError for another size.
    """
    if not config.last <= sigma <= config.first or config.scale == 0:
        return x0
    if tuple(reference.shape[1:]) != tuple(x0.shape[1:]) or reference.shape[0] not in (1, x0.shape[0]):
        raise ValueError(
            f"spectral guidance has a reference latent of shape {tuple(reference.shape)} and guides latents of shape "
            f"{tuple(x0.shape)}: give it a picture of the size that is sampled, one or as many as the batch has"
        )
    x, r = x0.float(), reference.to(x0.device, torch.float32).expand_as(x0)
    gradient = config.spectrum * amplitude_gradient(x, r) + config.structure * structure_gradient(x, r)
    return (x - config.scale * gradient).to(x0.dtype)


def _spectrum(x: Tensor) -> Tensor:
    return torch.fft.fft2(x, norm="ortho")
