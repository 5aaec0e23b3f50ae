"""Makes Gaussian noise the heavy-tailed noise of PFGM++: a multivariate Student-t of D degrees of freedom.

Xu et al. 2023, PFGM++ (arXiv 2302.04265): the kernel of eq. 4, p_r(x | y) ~ (|x - y|^2 + r^2)^(-(N + D) / 2), with the
alignment r = sigma sqrt(D), is a Student-t of D degrees of freedom and scale sigma about y. So n = z sqrt(D / chi^2_D)
with z ~ N(0, I) and one chi^2 to a sample, x = y + sigma n, and |n|^2 / N ~ F(N, D). Everything else stays: levels,
preconditioning, and the ODE dx/dsigma = (x - x0) / sigma. D = 1 is PFGM, D to infinity diffusion.

The radius is drawn by the quantile of chi^2 in double precision. The released code draws a Beta variable and clips it
to [1e-3, 1 - 1e-3], which cuts typical samples where N is much larger than D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .accounts import seed_of
from .path import broadcast

# The spacing of torch's doubles in [0, 1): half of it keeps a quantile off zero, whose latent would be infinite.
_SPACING = 2.0**-53


def check_aug_dim(aug_dim: float) -> None:
    """ValueError for a D that is neither 0 (Gaussian noise, as infinity is) nor above 2 and at most 1e12."""
    if not (aug_dim == 0 or 2 < aug_dim <= 1e12 or aug_dim == math.inf):
        raise ValueError(
            f"aug_dim must be 0 (Gaussian noise) or 2 to 1e12, got {aug_dim!r}: Student-t noise of 2 degrees "
            "of freedom or fewer has no variance"
        )


def quantiles(seed: int, items: Sequence[int]) -> Tensor:
    """Numbers in (0, 1), fp64 (B,): one for each item of a seed's stream, the same however the batch is split."""
    drawn = [
        torch.rand((), generator=torch.Generator().manual_seed(seed_of(seed, "student_t", item)), dtype=torch.float64)
        for item in items
    ]
    return torch.stack(drawn) + _SPACING / 2


def student_t(noise: Tensor, quantile: Tensor, aug_dim: float) -> Tensor:
    """Unit Gaussian noise (B, ...) made Student-t noise of D = aug_dim degrees of freedom, unit scale.

    quantile: of chi^2_D, fp64 (B,) in (0, 1), one to a sample. 0 and infinity give `noise` itself. The mean square is
    D / (D - 2), not 1.
    """
    if aug_dim == 0 or math.isinf(aug_dim):
        return noise
    # Imported here, so that ComfyUI's start does not wait for scipy.
    from scipy.special import gammaincinv

    chi2 = 2 * torch.as_tensor(gammaincinv(aug_dim / 2, quantile.double().cpu().numpy()))
    return noise * broadcast((aug_dim / chi2).sqrt().to(noise), noise)
