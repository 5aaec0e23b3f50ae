"""One step of a sampler that a search can branch at: from a level to the next with fresh noise, or without any.

ancestral: DDIM with eta 1 (Song et al. 2020, arXiv 2010.02502, eq. 12 and 16), which on VE and VP is k-diffusion's
Euler ancestral step and the DDPM posterior, and on FLOW the rectified-flow form of `standard`; with the x0 of a single
datum the marginal of the next level is exact. sde: the step that turns a flow's ODE into an SDE whose marginals are the
same as the steps get small (Liu et al. 2025, Flow-GRPO, arXiv 2505.05470). ode: Euler on the probability-flow ODE; the
same start gives the same end, so that a search can branch at the start alone.

With the same noise the steps are `standard`'s euler_ancestral and euler bit for bit (VE and FLOW).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .path import NoisePath, broadcast, vp_scale
from .standard import ancestral_levels, ancestral_step, flow_ancestral_levels

Kind = Literal["ancestral", "sde", "ode"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Transition:
    """How a latent goes down one level.

    kind: "ancestral", "sde" (FLOW only) or "ode". noise_level: sde only, the paper's a; more is more fresh noise.
    Raises ValueError for anything else.
    """

    kind: Kind = "ancestral"
    noise_level: float = 0.7

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"transition: kind {self.kind!r} is not known; use one of {', '.join(KINDS)}")
        if not (math.isfinite(self.noise_level) and self.noise_level > 0):
            raise ValueError(
                f"noise_level must be a positive number, got {self.noise_level!r}: 0.7 is the paper's; "
                "for steps without noise choose kind 'ode'"
            )

    @property
    def stochastic(self) -> bool:
        """Whether two steps from the same latent differ."""
        return self.kind != "ode"

    def check(self, path: NoisePath) -> None:
        """ValueError where this step does not exist on the path."""
        if self.kind == "sde" and path.kind != "FLOW":
            raise ValueError(
                f"transition: kind 'sde' is a step of flow models (FLOW) and this model is {path.kind}; "
                "choose 'ancestral'"
            )

    def step(
        self, path: NoisePath, x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """x (B, ...) at sigma (B,) > 0 -> the latent at sigma_next (B,), given the model's x0 (B, ...).

        noise: unit noise (B, ...), needed when `stochastic`; each item's is used only where its sigma_next is above 0.
        A stochastic step to level zero is x0 itself.
        """
        if self.kind == "ode":
            return path.move(x, x0, sigma, sigma_next)
        if noise is None:
            raise ValueError(f"transition: kind {self.kind!r} needs the noise of the step")
        here, there = (broadcast(s.to(x.dtype), x) for s in (sigma, sigma_next))
        if self.kind == "sde":
            x = self._sde(path, x, x0, here, there, noise)
        elif path.kind == "FLOW":
            x = _flow_ancestral(path, x, x0, here, there, noise)
        elif path.kind == "VP":
            # y = sqrt(1 + sigma^2) x is VE's latent.
            x = _ancestral(x * vp_scale(here), x0, here, there, noise) / vp_scale(there)
        else:
            x = _ancestral(x, x0, here, there, noise)
        return torch.where(there > 0, x, x0)

    def moments(
        self, path: NoisePath, x: Tensor, x0: Tensor, sigma: Tensor, sigma_next: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(mean (B, ...), standard deviation (B, 1, ...)) of the Gaussian that a stochastic step draws from.

        Gradients reach the mean through x and x0. At level zero the deviation is 0 and there is no density.
        """
        # The step is linear in x, x0 and the noise together, without a constant.
        unit = torch.ones_like(x[(slice(None), *(slice(1),) * (x.ndim - 1))])
        still = torch.zeros_like(unit)
        mean = self.step(path, x, x0, sigma, sigma_next, torch.zeros_like(x))
        return mean, self.step(path, still, still, sigma, sigma_next, unit)

    def _sde(self, path: NoisePath, x: Tensor, x0: Tensor, here: Tensor, there: Tensor, noise: Tensor) -> Tensor:
        dt = there - here
        v = (x - x0) / here
        # The diffusion is infinite at sigma = 1; the paper's code takes the level after it in the denominator.
        below = torch.where(here < 1, here, there)
        variance = self.noise_level**2 * here / (1 - below)
        drift = variance / (2 * here)
        mean = x * (1 + drift * dt) + v * (1 + drift * (1 - here)) * dt
        return mean + path.noise_scale * torch.sqrt(-dt * variance) * noise


def _ancestral(x: Tensor, x0: Tensor, here: Tensor, there: Tensor, noise: Tensor) -> Tensor:
    return ancestral_step(x, x0, here, *ancestral_levels(here, there), noise)


def _flow_ancestral(path: NoisePath, x: Tensor, x0: Tensor, here: Tensor, there: Tensor, noise: Tensor) -> Tensor:
    down, keep, up = flow_ancestral_levels(here, there)
    return ancestral_step(x, x0, here, down, up, noise * path.noise_scale, keep)
