"""Weak-to-strong reflection: before a step, go down with a strong model and back up with a weak one.

Bai et al., W2SD (arXiv 2502.00473), algorithm 1: x~ = Inv_weak(Denoise_strong(x)), then a step of the strong model
from x~. By theorem 1, x~ = x + sigma h (score_strong - score_weak) to first order in the step h, so that sampling
follows 2 score_strong - score_weak. Bai et al., Zigzag diffusion sampling (arXiv 2412.10891): the pair differs in cfg.

Every model is asked at the level of the latent that it gets. The leg down is one Euler step (DDIM), whatever the base
step is. Up: "euler" asks the weak model below and drifts by O(h), weak = strong included; "midpoint" asks it below and
halfway, half the drift; "fixed_point" solves for the latent whose Euler step leads to the one below, exactly.
The contract is that of `standard`; VP runs in VE coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from tqdm.auto import trange

from .path import VE, NoisePath, broadcast, vp_scale
from .settings import Settings, setting
from .standard import (
    SAMPLERS,
    Callback,
    FiniteWatch,
    Model,
    dpmpp_2m_step,
    heun_step,
    in_ve_on_vp,
    on_ve_latents,
)

Inversion = Literal["euler", "midpoint", "fixed_point"]
Base = Literal["euler", "heun", "dpmpp_2m"]
INVERSIONS: tuple[str, ...] = get_args(Inversion)
BASES: tuple[str, ...] = get_args(Base)
# (latent, level) -> the latent with what a mask keeps put back.
Keep = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ReflectionConfig(Settings):
    """Which steps are reflected, and how.

    begin, end: shares of the schedule's steps; 0 and 1 reflect all but a last step to zero, where there is no noise to
    put back. inversion: how the weak model leads up. iterations: "fixed_point" keeps each sample's best.
    """

    shown = ("end", "begin", "rounds", "inversion", "iterations", "base")

    begin: float = setting(0.0, 0, 1, step=0.05, round=1e-4, remedy="it is a share of the schedule, 0 is its noisiest",
        help="Steps before this share are not reflected; 0 begins with the noisiest.")
    end: float = setting(1.0, 0, 1, step=0.05, round=1e-4, remedy="it is a share of the schedule, 1 all of it",
        help="Up to which share of the steps, from the noisiest on; 1 is all, 0 none.",
        page="Up to which share of the steps, counted from the noisiest, there are reflections. 1: all but a last step "
        "to zero. 0: none.")
    rounds: int = setting(1, 1, 16, advanced=True, help="Reflections before each of these steps.")
    inversion: Inversion = setting("euler", advanced=True,
        help="How noise is put back. euler: as published, 1 call, drifts at few steps. midpoint: 2 calls, half the "
        "drift. fixed_point: exact where it converges, see iterations.",
        page="How noise is put back, see below.")
    iterations: int = setting(3, 1, 64, advanced=True, help="fixed_point only: its calls of the weak model.",
        page="For fixed_point: how many calls of the weak model it may take.")
    base: Base = setting("euler", advanced=True,
        help="The step itself. Ancestral ones draw noise that would drown the reflection, so there are none.",
        remedy="a step that draws fresh noise would drown what the reflection put into the latent")

    def check(self) -> None:
        """See the base."""
        if self.begin > self.end:
            raise ValueError(
                f"begin {self.begin!r} and end {self.end!r} must be shares of the schedule in this order, from 0 (the "
                "noisiest step) to 1"
            )

    @property
    def inversion_calls(self) -> int:
        """Calls of the weak model in one reflection."""
        return {"euler": 1, "midpoint": 2, "fixed_point": self.iterations}[self.inversion]

    def steps(self, sigmas: Tensor) -> range:
        """The steps of a schedule that are reflected. ValueError where the range holds no step that could be."""
        total = len(sigmas) - 1
        if total < 1 or self.begin == self.end:
            return range(0)
        last = total - 1 if float(sigmas[-1]) == 0 else total
        chosen = range(round(self.begin * total), min(round(self.end * total), last))
        if not chosen:
            raise ValueError(
                f"begin {self.begin:g} and end {self.end:g} hold none of the {last} steps of this schedule that can be "
                f"reflected (of {total}; a last step to zero cannot): widen the range or take more steps"
            )
        return chosen

    def cost(self, sigmas: Tensor) -> Cost:
        """What sampling along this schedule costs."""
        total = max(len(sigmas) - 1, 0)
        if self.base == "heun":
            total = 2 * total - int(total > 0 and float(sigmas[-1]) == 0)
        times = self.rounds * len(self.steps(sigmas))
        return Cost(total, times, self.inversion_calls * times)


@dataclass(frozen=True)
class Cost:
    """Calls of a whole run: of the model, of the one that goes down in reflections, and of the weak one."""

    model: int
    reflecting: int
    weak: int

    @property
    def total(self) -> int:
        """T + (1 + inversion calls) x reflections, guidance not counted."""
        return self.model + self.reflecting + self.weak


@torch.no_grad()
def sample_reflection(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    *,
    path: NoisePath = VE,
    weak: Model,
    config: ReflectionConfig,
    reflecting: Model | None = None,
    keep: Keep | None = None,
    inverted: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Sample with reflections; see `standard` for arguments, shapes and errors.

    weak, reflecting: `(x, sigma (B,)) -> x0`, with whatever else they need inside; reflecting goes down in place of
    `model`. keep: `(x, sigma)` -> x with the area that a mask keeps at that level, after each leg. inverted: told
    (step, residual (B,)) after each reflection by "fixed_point": its last correction over the latent, as root mean
    squares. The callback sees the latent after the reflections.
    """
    extra_args = {} if extra_args is None else extra_args
    if config.begin == config.end:
        return SAMPLERS[config.base](model, x, sigmas, extra_args, callback, disable, path=path)

    def down(y: Tensor, sigma: Tensor) -> Tensor:
        return model(y, sigma, **extra_args)

    legs = _Legs(reflecting or down, weak, keep, config, inverted)
    if path.kind == "VP":
        legs = _Legs(on_ve_latents(legs.strong), on_ve_latents(weak), _in_ve(keep), config, inverted)
    return _sample(model, x, sigmas, extra_args, callback, disable, path=path, legs=legs)


@in_ve_on_vp
def _sample(model, x, sigmas, extra_args, callback, disable, *, path: NoisePath, legs: _Legs) -> Tensor:
    config = legs.config
    chosen, s_in = config.steps(sigmas), x.new_ones([x.shape[0]])
    watch, levels, numbers = FiniteWatch(x, sigmas), sigmas.unbind(), sigmas.tolist()
    previous = None
    for i in trange(len(levels) - 1, disable=disable):
        sigma, sigma_next = levels[i], levels[i + 1]
        if i in chosen:
            for _ in range(config.rounds):
                x = legs.reflect(i, x, sigma, sigma_next, path, watch)
        denoised = model(x, sigma * s_in, **extra_args)
        watch.saw(i, denoised)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        if config.base == "euler":
            x = path.move(x, denoised, sigma, sigma_next)
        elif config.base == "heun":

            def ahead(y, i=i, sigma_next=sigma_next):
                found = model(y, sigma_next * s_in, **extra_args)
                watch.saw(i, found)
                return found

            x = heun_step(x, denoised, sigma, sigma_next, None if numbers[i + 1] == 0 else ahead)
        else:
            # Steps alone make the history: a leg's answer belongs to another latent or to another model.
            last = None if previous is None or numbers[i + 1] == 0 else (previous, levels[i - 1])
            x = dpmpp_2m_step(x, denoised, sigma, sigma_next, last)
            previous = denoised
    return watch.checked(x)


@dataclass(frozen=True, eq=False)
class _Legs:
    """Down with `strong`, up with `weak`; latents are VE's or FLOW's."""

    strong: Model
    weak: Model
    keep: Keep | None
    config: ReflectionConfig
    inverted: Callable[[int, Tensor], None] | None

    def reflect(self, i: int, x: Tensor, sigma: Tensor, below: Tensor, path: NoisePath, watch: FiniteWatch) -> Tensor:
        s_in = x.new_ones([x.shape[0]])

        def weak(y: Tensor, level: Tensor) -> Tensor:
            found = self.weak(y, level * s_in)
            watch.saw(i, found, "the weak model")
            return found

        denoised = self.strong(x, sigma * s_in)
        watch.saw(i, denoised, "the strong model, in a reflection,")
        y = self._kept(path.move(x, denoised, sigma, below), below)
        if self.config.inversion == "fixed_point":
            up = self._solved(i, x, y, sigma, below, weak)
        else:
            up = path.move(y, weak(y, below), below, sigma)
            if self.config.inversion == "midpoint":
                half, middle = (y + up) / 2, (sigma + below) / 2
                up = y + (half - weak(half, middle)) / middle * (sigma - below)
        return self._kept(up, sigma)

    def _solved(self, i: int, x: Tensor, y: Tensor, sigma: Tensor, below: Tensor, weak: Model) -> Tensor:
        """The latent whose Euler step by the weak model leads to y, by iteration from x, which it is for weak = strong.

        From an Euler guess some samples run off to another mode at few steps. What comes back never moved on from the
        iterate that the correction was smallest at, so one that does not converge is at worst the first-order answer.
        """
        guess = best = x
        size = _rms(x)
        lowest = torch.full_like(size, math.inf)
        for _ in range(self.config.iterations):
            found = y + (guess - weak(guess, sigma)) / sigma * (sigma - below)
            residual = _rms(found - guess) / size
            # Not "<": NaN must go on to where it is named.
            better = ~(residual >= lowest)
            best = torch.where(broadcast(better, x), found, best)
            lowest = torch.where(better, residual, lowest)
            guess = found
        if self.inverted is not None:
            self.inverted(i, lowest)
        return best

    def _kept(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x if self.keep is None else self.keep(x, sigma)


def _rms(x: Tensor) -> Tensor:
    return x.flatten(1).float().square().mean(1).sqrt()


def _in_ve(keep: Keep | None) -> Keep | None:
    """A VP mask for VE latents."""
    if keep is None:
        return None
    return lambda y, sigma: keep(y / vp_scale(sigma), sigma) * vp_scale(sigma)
