"""Decides how many micro-batches one step needs, by comparing the gradient's noise with its size.

AdAdaGrad (Lau et al. 2024, arXiv 2402.11215), the norm test of section 3: the batch is large enough while
Var / b <= eta^2 |mean|^2. Their |mean|^2 is the square of a noisy mean, too large by Var / b, so that b settles below
what the test asks for; here the noise is subtracted first. The micro-batches of one step are the samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class GradientNoise(NamedTuple):
    """variance: of one micro-batch's gradient, summed over the weights. mean_square: |E g|^2, free of the noise's
    share; noise can make it negative."""

    variance: float
    mean_square: float


def gradient_noise(squared_norms: Sequence[float], squared_norm_of_sum: float) -> GradientNoise:
    """Both unbiased estimates from |g_i|^2 of K >= 2 micro-batches and |g_1 + ... + g_K|^2. ValueError for fewer."""
    count = len(squared_norms)
    if count < 2:
        raise ValueError(
            f"squared_norms: a variance needs at least 2 micro-batches, got {count}; set accumulation to 2"
        )
    # Rounding can leave a tiny negative number where all gradients are equal.
    variance = max(0.0, (math.fsum(squared_norms) - squared_norm_of_sum / count) / (count - 1))
    return GradientNoise(variance, squared_norm_of_sum / count**2 - variance / count)


def next_accumulation(noise: GradientNoise, count: int, eta: float, cap: int) -> int:
    """Micro-batches of the next step: count, or ceil(variance / (eta^2 |mean|^2)) where that is more, at most cap.

    It never shrinks. A mean that is lost in the noise (mean_square <= 0) asks for the cap. Estimates from a few
    micro-batches scatter widely: average `variance` and `mean_square` over steps, not their ratio.
    ValueError for count < 1, eta <= 0 and cap < 1.
    """
    for name, value, low in (("count", count, 1), ("cap", cap, 1)):
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value!r}")
    if not (math.isfinite(eta) and eta > 0):
        raise ValueError(f"eta must be a positive number, got {eta!r}: 0.1 asks for large batches, 1 for small ones")
    if noise.variance == 0.0:
        return count
    needed = noise.variance / (eta**2 * noise.mean_square) if noise.mean_square > 0 else math.inf
    return max(count, cap if needed >= cap else math.ceil(needed))
