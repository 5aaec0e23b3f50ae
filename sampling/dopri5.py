"""Samples along the probability-flow ODE with the adaptive Dormand-Prince solver, to a tolerance instead of in steps.

Dormand and Prince 1980, "A family of embedded Runge-Kutta formulae", table 2: RK5(4)7M. Hairer, Norsett and Wanner,
"Solving Ordinary Differential Equations I", section II.4: error norm, step control and first step. It is the solver
with which Dao et al. 2023, "Flow Matching in Latent Space" (arXiv 2307.08698), sample, at atol = rtol = 1e-5.

    dx / dsigma = (x - x0(x, sigma)) / sigma        on VE and FLOW; on VP in VE's coordinates

A grid's ends alone count. Where it ends at zero the ODE is solved down to the model's lowest level and x0 taken there,
for networks know no level zero.

The whole batch takes one step size, and the item with the largest error decides it: every item is held to the tolerance
that it would have alone, but a batch of eight agrees with eight single runs to that tolerance and not to the bit. Steps
of their own would put the items at different levels, and ComfyUI looks at the first item's level where conditions have
a range of time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .path import VE, NoisePath, broadcast
from .standard import Model, SamplingDiverged, in_ve_on_vp

# The Butcher tableau; the last row is the fifth-order solution, whose slope is the next step's first (FSAL).
_C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
# Fifth-order weights minus fourth-order ones.
_E = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
_ORDER, _SAFETY, _LEAST, _MOST = 5, 0.9, 0.2, 10.0

Slope = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Dopri5Config:
    """Tolerances of one step and an end to the search for it.

    atol, rtol: an item's error, root mean square over its numbers, may be atol + rtol |x|. max_calls: of the model.
    Raises ValueError naming the field.
    """

    atol: float = 1e-5
    rtol: float = 1e-5
    max_calls: int = 1000

    def __post_init__(self) -> None:
        for name, value in (("atol", self.atol), ("rtol", self.rtol)):
            if not 1e-10 <= value <= 1:
                raise ValueError(f"{name} must be 1e-10 to 1, got {value!r}: 1e-5 is the paper's, 1e-3 is quick")
        if self.max_calls < 10:
            raise ValueError(f"max_calls must be at least 10, got {self.max_calls!r}: one step takes up to eight")


@dataclass(frozen=True)
class Spent:
    """What a run took: calls of the model, steps that were accepted, steps that were tried again smaller."""

    calls: int
    accepted: int
    rejected: int

    def __str__(self) -> str:
        return f"dopri5: {self.calls} calls, {self.accepted} steps, {self.rejected} rejected"


def step(slope: Slope, x: Tensor, sigma: float, h: float, first: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(x at sigma + h by the fifth-order formula, estimate of its error, the seven slopes); `first` = slope(x, sigma).

    The last slope is that at the new point.
    """
    slopes = [first]
    ahead = x
    for c, row in zip(_C, _A, strict=True):
        ahead = x + h * _weighted(row, slopes)
        slopes.append(slope(ahead, sigma + c * h))
    return ahead, h * _weighted(_E, slopes), slopes


def _weighted(weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    return torch.stack([w * k for w, k in zip(weights, slopes, strict=True) if w]).sum(0)


def _norm(value: Tensor, scale: Tensor) -> float:
    """The largest root mean square of value / scale among the items of a batch."""
    return float((value / scale).flatten(1).square().mean(1).sqrt().max())


def first_step(slope: Slope, x: Tensor, sigma: float, span: float, first: Tensor, config: Dopri5Config) -> float:
    """A size (above 0) for the first step downwards, from the slope and one more call (Hairer et al., II.4)."""
    scale = config.atol + config.rtol * x.abs()
    size, speed = _norm(x, scale), _norm(first, scale)
    guess = 1e-6 if min(size, speed) < 1e-5 else 0.01 * size / speed
    guess = min(guess, span)
    bend = _norm(slope(x - guess * first, sigma - guess) - first, scale) / guess
    most = max(speed, bend)
    by_bend = max(1e-6, guess * 1e-3) if most <= 1e-15 else (0.01 / most) ** (1 / _ORDER)
    return min(100 * guess, by_bend, span)


@torch.no_grad()
@in_ve_on_vp
def sample_dopri5(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    *,
    path: NoisePath = VE,
    config: Dopri5Config | None = None,
    sigma_min: float | None = None,
    report: Callable[[Spent], None] | None = None,
):
    """The latent at sigmas[-1]; see `standard` for arguments and shapes, and the module for what the levels mean.

    sigma_min: the model's lowest level, where a grid to zero ends (None: the grid's last but one). report: is told what
    the run took. The callback comes after every accepted step, its `i` the interval of the grid that has been reached.
    Latents are held in double precision where the device has it; the model gets x's own.
    Raises SamplingDiverged for a model that returns NaN, ValueError when max_calls are spent or levels do not descend.
    """
    config = config or Dopri5Config()
    if len(sigmas) < 2:
        return x
    grid = [float(s) for s in sigmas]
    if any(later >= earlier for earlier, later in zip(grid, grid[1:], strict=False)):
        raise ValueError(f"sigmas must descend, got {', '.join(f'{s:.4g}' for s in grid[:8])}; dopri5 does not invert")
    sigma, end = grid[0], grid[-1]
    if end == 0:
        end = min(sigma, grid[-2] if sigma_min is None else sigma_min)
    run = _Run(model, x, {} if extra_args is None else extra_args, config)
    state = x if x.device.type == "mps" else x.double()
    k, retried = run.slope(state, sigma), False
    h = first_step(run.slope, state, sigma, sigma - end, k, config) if sigma > end else 0.0
    with tqdm(disable=disable, unit=" calls") as bar:
        while sigma > end:
            h = min(h, sigma - end)
            ahead, error, slopes = step(run.slope, state, sigma, -h, k)
            bar.update(run.calls - bar.n)
            norm = _norm(error, config.atol + config.rtol * torch.maximum(state.abs(), ahead.abs()))
            if not math.isfinite(norm):
                raise _diverged(state, slopes, sigma, h)
            factor = _MOST if norm == 0 else min(_MOST, max(_LEAST, _SAFETY * norm ** (-1 / _ORDER)))
            if retried or norm > 1:
                # What follows a step that was too large must not grow at once into another.
                factor = min(1.0, factor)
            retried = norm > 1
            if retried:
                run.rejected += 1
            else:
                run.accepted += 1
                # Bits are lost in sigma - h, so the end is told by the size of the step.
                state, sigma, k = ahead, end if h == sigma - end else sigma - h, slopes[-1]
                if callback is not None:
                    callback(_seen(state.to(x.dtype), sigma, k, grid, sigma == end))
            h *= factor
    if report is not None:
        report(Spent(run.calls, run.accepted, run.rejected))
    # At the lowest level the slope tells the model's x0, which is the latent at level zero.
    return (state - sigma * k if grid[-1] == 0 else state).to(x.dtype)


class _Run:
    """The model as the ODE's slope, and what it has been asked for."""

    def __init__(self, model: Model, x: Tensor, extra_args: dict[str, Any], config: Dopri5Config):
        self.model, self.extra_args, self.config = model, extra_args, config
        self.dtype, self.ones = x.dtype, x.new_ones(x.shape[0])
        self.calls = self.accepted = self.rejected = 0

    def slope(self, x: Tensor, sigma: float) -> Tensor:
        """dx / dsigma (B, ...) at one level for the batch; ValueError when no call is left."""
        if self.calls >= self.config.max_calls:
            raise ValueError(
                f"max_calls ({self.config.max_calls}) are spent at sigma {sigma:.4g}, after {self.accepted} steps and "
                f"{self.rejected} that were rejected; raise max_calls, or raise atol and rtol: networks in half "
                "precision, and eps models below 1e-3, answer too coarsely for a fine tolerance"
            )
        self.calls += 1
        # Both as the model sees them, rounded: then the slope of an eps or flow network is what it answered.
        seen, level = x.to(self.dtype), sigma * self.ones
        x0 = self.model(seen, level, **self.extra_args)
        return ((seen - x0) / broadcast(level, x)).to(x)


def _seen(x: Tensor, sigma: float, k: Tensor, grid: list[float], done: bool) -> dict[str, Any]:
    """k-diffusion's dict of a step that ended at sigma."""
    passed = len(grid) - 1 if done else sum(level >= sigma for level in grid[1:])
    level = x.new_tensor(sigma)
    denoised = (x - sigma * k).to(x.dtype)
    return {"x": x, "i": max(0, passed - 1), "sigma": level, "sigma_hat": level, "denoised": denoised}


def _diverged(x: Tensor, slopes: list[Tensor], sigma: float, h: float) -> SamplingDiverged:
    if not bool(torch.isfinite(x).all()):
        return SamplingDiverged(
            f"the latent that entered dopri5 at sigma {sigma:.5g} already holds NaN or infinity; check the nodes that "
            "made the latent image and the noise"
        )
    where = next((c * h for c, k in zip((0.0, *_C), slopes, strict=True) if not bool(torch.isfinite(k).all())), 0.0)
    return SamplingDiverged(
        f"the model returned NaN or infinity at sigma {sigma - where:.5g}; run it in bf16 or fp32 instead of fp16, and "
        "check that the LoRA belongs to this model and that its strength and the cfg are not too high"
    )
