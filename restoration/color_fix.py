"""Gives a restored picture the colours of the degraded one, which restorers shift.

"wavelet": what is fine of the restored picture on what is coarse of the degraded one - Wang et al. 2023, StableSR
(arXiv 2305.07015), section 3.3: five levels of an a-trous transform, the kernel (1, 2, 1) / 4 along each axis with gaps
of 1, 2, 4, 8 and 16 pixels. "adain": mean and standard deviation of each channel - Huang and Belongie 2017 (arXiv
1703.06868), eq. 8. Both on images (B, H, W, 3); neither cuts to [0, 1].
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Method = Literal["wavelet", "adain", "none"]
METHODS: tuple[str, ...] = get_args(Method)
LEVELS = 5
_EPS = 1e-5


def color_fix(restored: Tensor, degraded: Tensor, method: Method) -> Tensor:
    """restored (B, H, W, 3) with the colours of degraded, of the same shape. ValueError for others."""
    if method not in METHODS:
        raise ValueError(f"colour fix {method!r} is not known; use one of {', '.join(METHODS)}")
    if restored.shape != degraded.shape:
        raise ValueError(
            f"the colours are to come from pictures of shape {tuple(degraded.shape)} and go to such of shape "
            f"{tuple(restored.shape)}: give them the same size and number"
        )
    if method == "none":
        return restored
    if method == "adain":
        return _adain(restored, degraded)
    # Both parts are linear, so the coarse part of the difference does for two.
    return restored + coarse(degraded - restored)


def coarse(images: Tensor, levels: int = LEVELS) -> Tensor:
    """What is left of images (B, H, W, C) after `levels` smoothings; the border is repeated outwards."""
    x = images.float().movedim(-1, 1)
    for level in range(levels):
        gap = 2**level
        for dim in (2, 3):
            wide = F.pad(x, (0, 0, gap, gap) if dim == 2 else (gap, gap, 0, 0), mode="replicate")
            n = x.shape[dim]
            x = wide.narrow(dim, gap, n) / 2 + (wide.narrow(dim, 0, n) + wide.narrow(dim, 2 * gap, n)) / 4
    return x.movedim(1, -1)


def _adain(restored: Tensor, degraded: Tensor) -> Tensor:
    means, deviations = zip(*(_moments(x.float()) for x in (restored, degraded)), strict=True)
    return (restored.float() - means[0]) / deviations[0] * deviations[1] + means[1]


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    # One pixel has no deviation, and the papers' estimate of it would be no number.
    spread = x.var((1, 2), keepdim=True, correction=min(1, x.shape[1] * x.shape[2] - 1))
    return x.mean((1, 2), keepdim=True), torch.sqrt(spread + _EPS)
