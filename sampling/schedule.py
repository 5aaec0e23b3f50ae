"""Noise schedules: the table of levels that a model was trained on, and the network's timestep for each level.

`DiscreteSchedule` is Stable Diffusion's (Ho et al. 2020, arXiv 2006.11239, with the "scaled linear" betas of Rombach et
al. 2021, arXiv 2112.10752, and the zero-terminal-SNR rescaling of Lin et al. 2023, arXiv 2305.08891, algorithm 1),
`FlowSchedule` rectified flow with SD3's timestep shift (Esser et al. 2024, arXiv 2403.03206, eq. 23) and `FluxSchedule`
the exponential form of it. They hold the same numbers as ComfyUI's ModelSamplingDiscrete, ModelSamplingDiscreteFlow and
ModelSamplingFlux, whose members they share, so code written against one works with the other:
`sigmas` ascending (N,), `sigma_min`, `sigma_max`, `timestep(sigma)`, `sigma(timestep)`, `percent_to_sigma(p)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class Schedule(Protocol):
    """What the grids and presets read of a schedule; ComfyUI's model_sampling objects have it too."""

    @property
    def sigmas(self) -> Tensor: ...

    @property
    def sigma_min(self) -> Tensor: ...

    @property
    def sigma_max(self) -> Tensor: ...

    def timestep(self, sigma: Tensor) -> Tensor: ...

    def sigma(self, timestep: Tensor) -> Tensor: ...

    def percent_to_sigma(self, percent: float) -> float: ...


# Stored in ComfyUI's table in place of the exact zero that algorithm 1 of Lin et al. gives, which has no finite sigma.
_ZSNR_LAST_ABAR = 4.8973451890853435e-08


class _Table:
    """The ends of a table of levels."""

    sigmas: Tensor

    @property
    def sigma_min(self) -> Tensor:
        return self.sigmas[0]

    @property
    def sigma_max(self) -> Tensor:
        return self.sigmas[-1]


@dataclass(frozen=True)
class DiscreteSchedule(_Table):
    """A table of trained noise levels, sigma_t = sqrt((1 - abar_t) / abar_t) for t = 0 .. timesteps - 1.

    beta_schedule: "linear" (linear in sqrt(beta): Stable Diffusion's scaled_linear, under ComfyUI's name for it) or
    "sqrt_linear" (linear in beta: DDPM, PixArt, DiT). zsnr: rescale to zero terminal SNR (CogVideoX).
    Raises ValueError naming the field.
    """

    beta_schedule: str = "linear"
    linear_start: float = 0.00085
    linear_end: float = 0.012
    timesteps: int = 1000
    zsnr: bool = False
    sigmas: Tensor = field(init=False, repr=False, compare=False)
    log_sigmas: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.timesteps < 2:
            raise ValueError(f"noise schedule: timesteps must be at least 2, got {self.timesteps}")
        if not 0 < self.linear_start <= self.linear_end < 1:
            raise ValueError(
                "noise schedule: 0 < linear_start <= linear_end < 1 is needed, "
                f"got {self.linear_start} and {self.linear_end}"
            )
        # fp64 until the end: fp32 loses the last digits of abar over a thousand products.
        if self.beta_schedule == "linear":
            root = torch.linspace(self.linear_start**0.5, self.linear_end**0.5, self.timesteps, dtype=torch.float64)
            betas = root**2
        elif self.beta_schedule == "sqrt_linear":
            betas = torch.linspace(self.linear_start, self.linear_end, self.timesteps, dtype=torch.float64)
        else:
            raise ValueError(
                f"noise schedule: beta_schedule {self.beta_schedule!r} is not known; use 'linear' or 'sqrt_linear'"
            )
        abar = torch.cumprod(1.0 - betas, dim=0)
        sigmas = ((1 - abar) / abar) ** 0.5
        if self.zsnr:
            sigmas = _zero_terminal_snr(sigmas)
        object.__setattr__(self, "sigmas", sigmas.float())
        object.__setattr__(self, "log_sigmas", sigmas.log().float())

    def timestep(self, sigma: Tensor) -> Tensor:
        """The integer timestep whose level is nearest in log sigma; sigma 0-d or (B,), the result likewise."""
        distance = (sigma.log().to(self.log_sigmas.device) - self.log_sigmas[:, None]).abs()
        return distance.argmin(dim=0).view(sigma.shape).to(sigma.device)

    def sigma(self, timestep: Tensor) -> Tensor:
        """The level of a timestep, fractional ones by interpolation in log sigma; out of range is clamped."""
        t = timestep.float().to(self.log_sigmas.device).clamp(min=0, max=self.timesteps - 1)
        below, above, w = t.floor().long(), t.ceil().long(), t.frac()
        log_sigma = (1 - w) * self.log_sigmas[below] + w * self.log_sigmas[above]
        return log_sigma.exp().to(timestep.device)

    def percent_to_sigma(self, percent: float) -> float:
        """The level at which `percent` (0 .. 1) of the sampling is done; above every level at 0."""
        if percent <= 0.0:
            return 999999999.9
        if percent >= 1.0:
            return 0.0
        # 999 for any table length: core's convention, which conditioning ranges saved in workflows rely on.
        return self.sigma(torch.tensor((1.0 - percent) * 999.0)).item()


def _zero_terminal_snr(sigmas: Tensor) -> Tensor:
    """Lin et al. 2023, algorithm 1: shift sqrt(abar) to end at zero, scale it to keep its first value."""
    root = (1 / (sigmas * sigmas + 1)).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    abar = root**2
    abar[-1] = _ZSNR_LAST_ABAR
    return ((1 - abar) / abar) ** 0.5


class _Flow(_Table):
    """A flow's schedule; what differs is how an unshifted time t in (0, 1] becomes a level."""

    multiplier: float

    @property
    def log_sigmas(self) -> Tensor:
        return self.sigmas.log()

    def timestep(self, sigma: Tensor) -> Tensor:
        """The network's timestep at level sigma (not shifted back: the network is told the true level)."""
        return sigma * self.multiplier

    def sigma(self, timestep: Tensor) -> Tensor:
        """The shifted level of an unshifted timestep in (0, multiplier]."""
        return self._shifted(timestep / self.multiplier)

    def percent_to_sigma(self, percent: float) -> float:
        """The level at which `percent` (0 .. 1) of the sampling is done."""
        if percent <= 0.0:
            return 1.0
        if percent >= 1.0:
            return 0.0
        return self._shifted(1.0 - percent)

    def _shifted(self, t: Any) -> Any:
        raise NotImplementedError

    def _tabulate(self, entries: int) -> None:
        table = self.sigma((torch.arange(1, entries + 1, 1) / entries) * self.multiplier)
        object.__setattr__(self, "sigmas", table)


@dataclass(frozen=True)
class FlowSchedule(_Flow):
    """Rectified flow: sigma in (0, 1] is the time itself; `shift` moves the table towards the noise.

    shift: SD3's timestep shift (1 = none). multiplier: what the network's timestep is, per unit of sigma.
    noise_scale: standard deviation of the model's noise, for `NoisePath("FLOW", noise_scale)`.
    """

    shift: float = 1.0
    multiplier: float = 1000
    noise_scale: float = 1.0
    sigmas: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("shift", "multiplier", "noise_scale"):
            value = {"shift": self.shift, "multiplier": self.multiplier, "noise_scale": self.noise_scale}[name]
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"noise schedule: {name} must be a positive number, got {value!r}")
        self._tabulate(1000)

    def _shifted(self, t: Any) -> Any:
        return t if self.shift == 1.0 else self.shift * t / (1 + (self.shift - 1) * t)


@dataclass(frozen=True)
class FluxSchedule(_Flow):
    """Flux's flow schedule: sigma = e^shift / (e^shift + 1/t - 1); the network's timestep is sigma itself."""

    shift: float = 1.15
    sigmas: Tensor = field(init=False, repr=False, compare=False)
    multiplier: float = field(default=1, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not math.isfinite(self.shift):
            raise ValueError(f"noise schedule: shift must be a finite number, got {self.shift!r}")
        self._tabulate(10_000)

    def _shifted(self, t: Any) -> Any:
        return math.exp(self.shift) / (math.exp(self.shift) + (1 / t - 1))
