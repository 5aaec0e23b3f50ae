"""Sampling grids: which levels of a schedule a sampler visits, as a 1-D float tensor of steps + 1 levels ending in 0.

The same floats as ComfyUI's schedulers of the same names. karras: Karras et al. 2022 (arXiv 2206.00364), eq. 5, rho 7;
beta: Lee et al. 2024 (arXiv 2407.12173), Beta(0.6, 0.6). `ddim_uniform` and `beta` may return more or fewer levels than
asked, as core's do. Every grid raises ValueError for fewer than one step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .schedule import Schedule


def _require_steps(grid: str, steps: int) -> None:
    if steps < 1:
        raise ValueError(f"grid {grid!r}: steps must be at least 1, got {steps}; nothing would be sampled")


def _levels(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def simple(schedule: Schedule, steps: int) -> Tensor:
    """Every (N / steps)-th level of the table, from the top: 999, 749, 499, 249 for Stable Diffusion in 4 steps."""
    _require_steps("simple", steps)
    stride = len(schedule.sigmas) / steps
    return _levels([float(schedule.sigmas[-1 - int(i * stride)]) for i in range(steps)] + [0.0])


def sgm_uniform(schedule: Schedule, steps: int) -> Tensor:
    """Uniform in timestep from the top, the lowest timestep left out: 999, 749.25, 499.5, 249.75."""
    _require_steps("sgm_uniform", steps)
    return _uniform(schedule, steps + 1, drop_last=True)


def normal(schedule: Schedule, steps: int) -> Tensor:
    """Uniform in timestep, top and bottom included: 999, 666, 333, 0."""
    _require_steps("normal", steps)
    bottom = schedule.sigma(schedule.timestep(schedule.sigma_min))
    if math.isclose(float(bottom), 0, abs_tol=1e-5):
        # The table's lowest level already is the final zero: visiting it would waste a call.
        return _uniform(schedule, steps + 1, drop_last=False, closed=True)
    return _uniform(schedule, steps, drop_last=False)


def _uniform(schedule: Schedule, points: int, *, drop_last: bool, closed: bool = False) -> Tensor:
    top, bottom = (float(schedule.timestep(s)) for s in (schedule.sigma_max, schedule.sigma_min))
    timesteps = torch.linspace(top, bottom, points)
    if drop_last:
        timesteps = timesteps[:-1]
    return _levels([float(schedule.sigma(t)) for t in timesteps] + ([] if closed else [0.0]))


def karras(schedule: Schedule, steps: int, rho: float = 7.0) -> Tensor:
    """Uniform in sigma^(1/rho) between the schedule's ends."""
    _require_steps("karras", steps)
    low, high = float(schedule.sigma_min) ** (1 / rho), float(schedule.sigma_max) ** (1 / rho)
    sigmas = (high + torch.linspace(0, 1, steps) * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def exponential(schedule: Schedule, steps: int) -> Tensor:
    """Uniform in log sigma between the schedule's ends."""
    _require_steps("exponential", steps)
    ends = math.log(float(schedule.sigma_max)), math.log(float(schedule.sigma_min))
    sigmas = torch.linspace(*ends, steps).exp()
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def ddim_uniform(schedule: Schedule, steps: int) -> Tensor:
    """Every (N // steps)-th level of the table, from the bottom: 751, 501, 251, 1."""
    _require_steps("ddim_uniform", steps)
    table = schedule.sigmas
    starts_at_zero = math.isclose(float(table[1]), 0, abs_tol=1e-5)
    stride = max(len(table) // (steps + 1 if starts_at_zero else steps), 1)
    levels = [float(table[i]) for i in range(1, len(table), stride)]
    return _levels((levels if starts_at_zero else [0.0, *levels])[::-1])


def beta(schedule: Schedule, steps: int, alpha: float = 0.6, beta: float = 0.6) -> Tensor:
    """Quantiles of a Beta distribution over the table: dense at both ends; repeated levels are visited once."""
    _require_steps("beta", steps)
    last = len(schedule.sigmas) - 1
    indices = [round(_beta_quantile(1 - i / steps, alpha, beta) * last) for i in range(steps)]
    visited = [i for k, i in enumerate(indices) if k == 0 or i != indices[k - 1]]
    return _levels([float(schedule.sigmas[i]) for i in visited] + [0.0])


def _beta_quantile(p: float, a: float, b: float) -> float:
    """The x with I_x(a, b) = p, by bisection to the last bit; our own so that torch alone is enough."""
    if p >= 1.0:
        return 1.0
    if a == b and p == 0.5:
        return 0.5  # exact by symmetry: at 2 steps it falls on a tie of the rounding
    low, high = 0.0, 1.0
    while (mid := (low + high) / 2) not in (low, high):
        if _beta_cdf(mid, a, b) < p:
            low = mid
        else:
            high = mid
    return high


def _beta_cdf(x: float, a: float, b: float) -> float:
    """Regularised incomplete beta function by its continued fraction (DLMF 8.17.22), evaluated by Lentz's method."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side only
        return 1.0 - _beta_cdf(1.0 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    value, c, d = 1.0, 1.0, 0.0
    for n in range(200):
        m = n // 2
        if n == 0:
            term = 1.0
        elif n % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1.0 / (1.0 + term * d)
        c = 1.0 + term / c
        value *= c * d
        if n and abs(c * d - 1.0) < 1e-16:
            break
    return math.exp(log_front) * (value - 1.0) / a


GRIDS: dict[str, Callable[[Schedule, int], Tensor]] = {
    "simple": simple,
    "sgm_uniform": sgm_uniform,
    "karras": karras,
    "exponential": exponential,
    "ddim_uniform": ddim_uniform,
    "beta": beta,
    "normal": normal,
}
