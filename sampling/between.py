"""What a student does between its levels besides keeping or renewing all its noise, and what its network is told.

`Partly` renews a part of the noise. ancestral: DDIM's with eta (Song et al. 2020, arXiv 2010.02502, eq. 16), on FLOW
the rectified-flow form of `standard`. tcd: strategic stochastic sampling (Zheng et al. 2024, arXiv 2402.19159,
algorithm 2, with the paper's gamma as eta): down to timestep s = (1 - eta) t', and from there noised up to t'.
`told`: a network that was trained to be told an earlier timestep than its latent's (NitroFusion, Chen et al. 2024,
arXiv 2412.02030). `handover`: the step at which a second network goes on (Wan 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .path import NoisePath, broadcast, level_of, time_of, vp_scale
from .schedule import Schedule
from .standard import ancestral_levels, ancestral_step, flow_ancestral_levels, flow_noise

# Two levels this close are one (core's own tolerance for "starts at sigma_max").
SAME_LEVEL = 1e-5


@dataclass(frozen=True, eq=False)
class Partly:
    """For each step of a grid: the level below that it goes to, and the noise that leads up from there again.

    down, up: (steps,). keep: (steps,), the factor of the latent on the way up; None on VE and VP. No step to zero has
    noise.
    """

    path: NoisePath
    down: Tensor
    up: Tensor
    keep: Tensor | None

    def step(self, i: int, x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor) -> Tensor:
        """Step i of the grid, from x (B, ...) at sigma to sigma_next (0-d, above 0). noise: unit noise of x's shape."""
        down, up = self.down[i], self.up[i]
        if self.keep is not None:
            return ancestral_step(x, x0, sigma, down, up, noise * self.path.noise_scale, self.keep[i])
        if self.path.kind == "VE":
            return ancestral_step(x, x0, sigma, down, up, noise)
        # y = sqrt(1 + sigma^2) x is VE's latent.
        return ancestral_step(x * vp_scale(sigma), x0, sigma, down, up, noise) / vp_scale(sigma_next)


def ancestral(path: NoisePath, sigmas: Tensor, eta: float) -> Partly:
    """The steps of `standard`'s euler_ancestral along sigmas (steps + 1,)."""
    here, there = sigmas[:-1], sigmas[1:]
    if path.kind == "FLOW":
        down, keep, up = flow_ancestral_levels(here, there, eta)
        return Partly(path, down, up, keep)
    down, up = ancestral_levels(here, there, eta)
    return Partly(path, down, up, None)


def tcd(path: NoisePath, schedule: Schedule, sigmas: Tensor, eta: float) -> Partly:
    """TCD's steps along sigmas (steps + 1,): 0 keeps all of the noise, 1 renews all of it above timestep 0.

    As in its authors' code s is rounded down to a whole timestep where the schedule is a table; a flow's is its time.
    The last level is the grid's own, where that code ends at timestep 0.
    """
    there = sigmas[1:]
    if path.kind == "FLOW":
        down = (1 - eta) * there
        keep, up = flow_noise(down, there)
        return Partly(path, down, up, keep)
    if eta == 0:
        return Partly(path, there, torch.zeros_like(there), None)
    if path.rectified:
        down = level_of((1 - eta) * time_of(there))
    else:
        # Whatever is found for a level of zero is not used.
        s = (1 - eta) * schedule.timestep(there.clamp_min(torch.finfo(there.dtype).tiny))
        down = torch.minimum(schedule.sigma(s.floor()).to(there), there)
    return Partly(path, down, (there**2 - down**2) ** 0.5, None)


def clipped(noise: Tensor, deviations: float | None) -> Tensor:
    """Noise cut off at so many of its own standard deviations; None cuts nothing."""
    if deviations is None:
        return noise
    limit = deviations * noise.std()
    return noise.clamp(min=-limit, max=limit)


def told(x: Tensor, sigma: Tensor, scale: float, schedule: Schedule, path: NoisePath) -> tuple[Tensor, Tensor]:
    """(latent, level (B,)) at which a network is asked, so that it is told its timestep at sigma (B,) times `scale`.

    What enters the network stays what it was, and its answer is read at the level that it was told, as NitroFusion's
    authors do; in a table the timestep is rounded down to a whole one.
    """
    if path.kind == "FLOW":
        return x, sigma * scale
    if path.rectified:
        level = level_of(time_of(sigma) * scale)
    else:
        level = schedule.sigma((schedule.timestep(sigma) * scale).floor()).to(sigma)
    if path.kind == "VP":
        return x, level
    return x * broadcast(path.shrinking(level) / path.shrinking(sigma), x), level


def handover(sigmas: Tensor, boundary: float) -> int:
    """How many steps of a grid a first network makes, whose levels are those from `boundary` up."""
    first = sigmas[:-1].tolist()
    return next((i for i, level in enumerate(first) if below(level, boundary)), len(first))


def below(level: float, boundary: float) -> bool:
    """Whether a level is the second network's."""
    return level < boundary * (1 - SAME_LEVEL)
