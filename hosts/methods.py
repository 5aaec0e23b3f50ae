"""Samplers of ours that need more of a run than its latent and levels, written once for both hosts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..restoration import one_step
from ..sampling.dopri5 import Dopri5Config, sample_dopri5
from ..sampling.path import NoisePath
from ..sampling.schedule import Schedule
from ..sampling.structure import StructureConfig, sample_structure


@dataclass(frozen=True, eq=False)
class Run:
    """What a host lends a method for one run.

    model(x, sigma (B,), **extra_args) -> x0 with guidance and mask inside. x (B, C, ...): the latent at sigmas[0].
    clean: the LATENT without noise, in the model's scale. noise: the run's unit noise. mask: of x's shape, 1 where the
    latent may change. latents_in: LATENT samples in the model's scale, ValueError for those of another model. tell:
    says a line to the user. callback: k-diffusion's.
    """

    model: Callable[..., Tensor]
    x: Tensor
    clean: Tensor
    sigmas: Tensor
    path: NoisePath
    schedule: Schedule
    noise: Tensor
    mask: Tensor | None
    latents_in: Callable[[Tensor], Tensor]
    tell: Callable[[str], None]
    callback: Callable[[dict[str, Any]], None] | None = None
    extra_args: dict[str, Any] = field(default_factory=dict)
    disable: bool = True


class Method(Protocol):
    """A way to sample."""

    def sample(self, run: Run) -> Tensor:
        """The latent at run.sigmas[-1]."""
        ...


@dataclass(frozen=True)
class Dopri5:
    """`sampling.dopri5`, down to the model's lowest level where the sigmas end at zero."""

    config: Dopri5Config

    def sample(self, run: Run) -> Tensor:
        """See Method; tells how many calls it took."""
        return sample_dopri5(
            run.model,
            run.x,
            run.sigmas,
            run.extra_args,
            run.callback,
            run.disable,
            path=run.path,
            config=self.config,
            sigma_min=float(run.schedule.sigma_min),
            report=lambda spent: run.tell(str(spent)),
        )


@dataclass(frozen=True, eq=False)
class Structure:
    """`sampling.structure` with a reference as a LATENT stores it, guided from one percentage of the run to another."""

    reference: Tensor
    factor: int
    iterations: int
    steps: str
    start_percent: float
    end_percent: float

    def __post_init__(self) -> None:
        if not 0 <= self.start_percent <= self.end_percent <= 1:
            raise ValueError(
                f"start_percent {self.start_percent:g} and end_percent {self.end_percent:g} enclose nothing: 0 is the "
                "first step, 1 the last, and start_percent comes first"
            )
        StructureConfig(self.factor, self.iterations, steps=self.steps)

    def sample(self, run: Run) -> Tensor:
        """See Method."""
        first, last = (run.schedule.percent_to_sigma(p) for p in (self.start_percent, self.end_percent))
        return sample_structure(
            run.model,
            run.x,
            run.sigmas,
            run.extra_args,
            run.callback,
            run.disable,
            path=run.path,
            config=StructureConfig(self.factor, self.iterations, first, last, self.steps),
            reference=run.latents_in(self.reference),
            noise=run.noise,
            mask=run.mask,
        )


@dataclass(frozen=True)
class Restore:
    """`restoration.one_step`: one call on the clean latent."""

    def sample(self, run: Run) -> Tensor:
        """See Method; run.sigmas are those of `OneStep.sigmas`."""
        return one_step.restore(
            run.model, run.clean, run.sigmas, run.extra_args, run.callback, run.disable, path=run.path
        )


def stored(path: NoisePath, x: Tensor, sigma: Tensor) -> Tensor:
    """x at level sigma (0-d) as a LATENT that still holds noise keeps it: with its clean part in full.

    Without further noise a sampler that begins at sigma begins at x.
    """
    if path.kind == "FLOW":
        return x / (1.0 - sigma)
    return x * torch.sqrt(1.0 + sigma**2) if path.kind == "VP" else x


def later(callback: Callable[..., None] | None, done: int, steps: int) -> Callable[..., None] | None:
    """A host's callback (step, x0, x, steps) for a sampler that begins when `done` of `steps` are behind."""
    if callback is None:
        return None
    return lambda step, x0, x, total: callback(step + done, x0, x, steps)
