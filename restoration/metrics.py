"""How near one picture is to another: PSNR, and SSIM of Wang et al. 2004.

"Image quality assessment: from error visibility to structural similarity", IEEE TIP 13(4), eq. 13, with its Gaussian
window of 11 x 11 pixels and deviation 1.5, C1 = 0.01^2 and C2 = 0.03^2 for values in [0, 1]; the mean over channels and
over the places where the window fits, or over all places of a picture smaller than the window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SIDE, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """(B,) in dB, of images (B, H, W, C) in [0, 1]; infinity where they are equal. ValueError for unequal shapes."""
    return -10 * torch.log10(_checked(a, b).square().flatten(1).mean(1))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """(B,) of images (B, H, W, C) in [0, 1]; 1 where they are equal. ValueError for unequal shapes."""
    _checked(a, b)
    # Variances are small differences of large numbers.
    x, y = (t.double().movedim(-1, 1).flatten(0, 1)[:, None] for t in (a, b))
    place = torch.arange(_SIDE, dtype=torch.float64, device=a.device) - _SIDE // 2
    bell = torch.exp(-(place**2) / (2 * _SIGMA**2))
    bell = bell / bell.sum()
    short = [max(0, _SIDE - side) for side in a.shape[1:3]]
    if any(short):
        half = _SIDE // 2
        x, y = (F.pad(t, (half,) * 4, mode="replicate") for t in (x, y))

    def mean(t: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(t, bell[None, None, :, None]), bell[None, None, None])

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    found = (2 * mx * my + _C1) * (2 * cov + _C2) / ((mx * mx + my * my + _C1) * (vx + vy + _C2))
    return found.flatten(1).mean(1).view(a.shape[0], -1).mean(1).float()


def _checked(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:
        raise ValueError(f"pictures of shape {tuple(a.shape)} and {tuple(b.shape)} cannot be compared: resize one")
    return a.float() - b.float()
