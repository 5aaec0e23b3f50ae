"""The SAMPLERs of ours, written once for both hosts: each is a method, which a host gives one sampling run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..restoration import one_step
from ..sampling import presets
from ..sampling.between import handover
from ..sampling.distilled import Rule, Start, sample_distilled, start
from ..sampling.dopri5 import Dopri5Config, sample_dopri5
from ..sampling.prior import Prior
from ..sampling.reflection import Keep, ReflectionConfig, sample_reflection
from ..sampling.schedule import Schedule
from ..sampling.standard import Model, default_noise_sampler
from ..sampling.structure import StructureConfig, sample_structure
from ..sampling.teleport import Teleport

# Of the latent, as root mean squares: above it the legs no longer undo each other well.
POOR = 0.02

Beside = Callable[[Model, Mapping[str, Model]], Tensor]
"""A job for several guiders at once: (the run's own model, the others' by name) -> what the run ends with."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Run(Prior):
    """What a host gives a method for one run of a guider.

    latent: the LATENT without noise, in the model's scale. noise: the run's unit noise. mask: of the latents' shape, 1
    where they may change. schedule: the model's. latents_in: LATENT samples in the model's scale, ValueError for those
    of another model; latents_out: back. tell(text, warn=False): says a line to the user. callback: k-diffusion's.

    keep(x, sigma): x with what the mask keeps whole put back, at level sigma; None without a mask. other(SAMPLER): what
    another SAMPLER makes of this run; other(SAMPLER, i, x): of the rest of it, from x at the level of number i.
    beside(guiders, job): what the job makes of the models of further guiders by name, each of which is inside a
    sampling run of its own meanwhile; ValueError for guiders that cannot stand beside this run's. again: to be called
    when other networks may have taken the model's place on the GPU.

    labelled(scale): the run's model, whose network is told timesteps times a factor (`sampling.between.told`).
    relay(guider, x, sigma, job, label_scale=1): what job(model, x) makes of another guider's model, labelled so, from x
    at level sigma (0-d) on, which it gets as a LATENT goes from sampler to sampler. The guider is inside a sampling run
    of its own; this run's model is not asked again, and may leave memory. ValueError as for `beside`.
    """

    latent: Tensor
    noise: Tensor
    mask: Tensor | None
    schedule: Schedule
    latents_in: Callable[[Tensor], Tensor]
    latents_out: Callable[[Tensor], Tensor]
    tell: Callable[..., None]
    keep: Keep | None
    other: Callable[..., Tensor]
    beside: Callable[[Mapping[str, Any], Beside], Tensor]
    labelled: Callable[[float], Model]
    relay: Callable[..., Tensor]
    again: Callable[[], None]
    callback: Callable[[dict[str, Any]], None] | None = None
    disable: bool = True


class Method(ABC):
    """A way to sample.

    searches: whether it samples candidates of its own, any number at once. All rows of its run belong to one picture;
    mask, latent and noise come in one row, and the run tells batch, mixed_levels, calls_per_eval and identity.
    """

    searches: ClassVar[bool] = False

    @property
    def relays(self) -> bool:
        """Whether it hands a run on to another guider, where the levels of the run's own end."""
        return False

    @abstractmethod
    def sample(self, run: Run) -> Tensor:
        """The latents at run.sigmas[-1], as `run.finished` leaves them."""


def sampled(method: Method, run: Run) -> Tensor:
    """What a method makes of a run; of a schedule of one level, which has no step, what core's samplers make of it."""
    if len(run.sigmas) < 2 and not method.searches:
        return run.finished(run.first(run.noise))
    return method.sample(run)


@dataclass(frozen=True)
class Distilled(Method):
    """`sampling.distilled`: few steps, from the start that the student was trained on.

    rule: what happens between the levels. preset: tells the level that the student itself starts from; a grid that
    begins below it, or below the model's own highest level where there is no preset, means image to image. second: the
    GUIDER of a second network, for the levels below `boundary` (Wan 2.2).
    """

    rule: Rule
    start: Start
    preset: presets.Preset | None = None
    second: Any = None
    boundary: float = 0.0

    @property
    def relays(self) -> bool:
        """See Method."""
        return self.second is not None

    def sample(self, run: Run) -> Tensor:
        """See Method."""
        own = None if self.preset is None else presets.start_level(self.preset, run.schedule, run.path)
        path, scale, total = self.rule.noised(run.path), self.rule.label_scale, len(run.sigmas) - 1
        x = start(path, run.sigmas[0], run.noise, run.latent, self.start, run.top, own)
        fresh = default_noise_sampler(x, run.extra_args.get("seed"))

        def sampled(steps: range, model: Model, x: Tensor) -> Tensor:
            return sample_distilled(
                model, x, run.sigmas, run.extra_args, run.callback, run.disable, path=path, rule=self.rule,
                schedule=run.schedule, noise_sampler=fresh, steps=steps,
            )  # fmt: skip

        first = handover(run.sigmas, self.boundary) if self.relays else total
        x = sampled(range(first), run.labelled(scale), x)
        if first < total:
            x = run.relay(self.second, x, run.sigmas[first], partial(sampled, range(first, total)), scale)
        return run.finished(x)


@dataclass(frozen=True, eq=False)
class Teleported(Method):
    """Another SAMPLER, begun at the level and the latent that a Gaussian's flow leads to."""

    inner: Any
    plan: Teleport

    def sample(self, run: Run) -> Tensor:
        """See Method; where nothing can be skipped, the inner sampler's own run."""
        empty = not bool(torch.count_nonzero(run.latent))
        why_not = self.plan.why_not(run.sigmas, run.noise.shape, run.top, empty, run.mask is not None)
        if why_not:
            run.tell(f"Teleport does nothing: {why_not}")
            return run.other(self.inner)
        x = self.plan.jump(partial(run.model, **run.extra_args), run.first(run.noise), run.sigmas, run.path)
        done, steps = self.plan.first(run.sigmas), len(run.sigmas) - 1
        run.tell(f"Teleport: {done} of {steps} steps skipped, to sigma {float(run.sigmas[done]):.4g}")
        return run.finished(x) if done == steps else run.other(self.inner, done, x)


@contextmanager
def _residuals_told(say: Callable[..., None]) -> Iterator[Callable[[int, Tensor], None]]:
    """A function that collects what the inversion left in each reflection; at the end `say` tells the worst."""
    seen: list[tuple[int, Tensor]] = []

    def collect(step: int, residual: Tensor) -> None:
        seen.append((step, residual.max()))

    yield collect
    if seen:
        # One wait for the device, at the end.
        step, worst = max(zip((s for s, _ in seen), torch.stack([r for _, r in seen]).tolist(), strict=True),
                          key=lambda pair: pair[1])  # fmt: skip
        text = f"reflection: the inversion left at most {worst:.2g} of the latent (step {step + 1})"
        poor = worst > POOR
        if poor:
            text += "; raise iterations, take more steps, or leave the late steps out"
        say(text, warn=poor)


@dataclass(frozen=True, eq=False)
class Reflected(Method):
    """`sampling.reflection` with a weak guider, and another that goes down in place of the run's own if wished."""

    weak: Any
    config: ReflectionConfig
    reflecting: Any = None

    def sample(self, run: Run) -> Tensor:
        """See Method; tells how well the inversion did."""
        if not self.config.steps(run.sigmas):  # nor is anything loaded for a range that cannot be
            return self._sampled(run, run.model, {"weak": run.model})
        guiders = {"weak": self.weak} | ({} if self.reflecting is None else {"reflecting": self.reflecting})
        return run.beside(guiders, partial(self._sampled, run))

    def _sampled(self, run: Run, strong: Model, others: Mapping[str, Model]) -> Tensor:
        with _residuals_told(run.tell) as told:
            x = sample_reflection(
                strong,
                run.first(run.noise),
                run.sigmas,
                run.extra_args,
                run.callback,
                run.disable,
                path=run.path,
                weak=others["weak"],
                reflecting=others.get("reflecting"),
                config=self.config,
                keep=run.keep,
                inverted=told,
            )
        return run.finished(x)


@dataclass(frozen=True)
class Dopri5(Method):
    """`sampling.dopri5`, down to the model's lowest level where the sigmas end at zero."""

    config: Dopri5Config

    def sample(self, run: Run) -> Tensor:
        """See Method; tells how many calls it took."""
        x = sample_dopri5(
            run.model,
            run.first(run.noise),
            run.sigmas,
            run.extra_args,
            run.callback,
            run.disable,
            path=run.path,
            config=self.config,
            sigma_min=float(run.schedule.sigma_min),
            report=lambda spent: run.tell(str(spent)),
        )
        return run.finished(x)


def check_lowest(lowest: float, sigmas: Tensor, method: Method | None) -> None:
    """ValueError where a guider's model, which is for the levels from `lowest` up, would be asked below them.

    method: the SAMPLER's; None for one that is not of ours.
    """
    if handover(sigmas, lowest) < len(sigmas) - 1 and not (method is not None and method.relays):
        raise ValueError(
            f"sigmas go below {lowest:g}, where the guider's model ends and its second one begins: sample with the "
            "SAMPLER of the same Distilled Setup, or split the sigmas there for two samplers, each with its model"
        )


def check_range(start_percent: float, end_percent: float) -> None:
    """ValueError for a part of a run that is none."""
    if not 0 <= start_percent <= end_percent <= 1:
        raise ValueError(
            f"start_percent {start_percent:g} and end_percent {end_percent:g} enclose nothing: 0 is the first step, 1 "
            "the last, and start_percent comes first"
        )


@dataclass(frozen=True, eq=False)
class Structure(Method):
    """`sampling.structure` with a reference as a LATENT stores it, guided from one percentage of the run to another."""

    reference: Tensor
    factor: int
    iterations: int
    steps: str
    start_percent: float
    end_percent: float

    def __post_init__(self) -> None:
        check_range(self.start_percent, self.end_percent)
        StructureConfig(self.factor, self.iterations, steps=self.steps)

    def sample(self, run: Run) -> Tensor:
        """See Method."""
        first, last = (run.schedule.percent_to_sigma(p) for p in (self.start_percent, self.end_percent))
        x = sample_structure(
            run.model,
            run.first(run.noise),
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
        return run.finished(x)


@dataclass(frozen=True)
class Restore(Method):
    """`restoration.one_step`: one call on the clean latent."""

    def sample(self, run: Run) -> Tensor:
        """See Method; run.sigmas are those of `OneStep.sigmas`."""
        x = one_step.restore(
            run.model, run.latent, run.sigmas, run.extra_args, run.callback, run.disable, path=run.path
        )
        return run.finished(x)


def later(callback: Callable[..., None] | None, done: int, steps: int) -> Callable[..., None] | None:
    """A host's callback (step, x0, x, steps) for a sampler that begins when `done` of `steps` are behind."""
    if callback is None:
        return None
    return lambda step, x0, x, total: callback(step + done, x0, x, steps)


def reporter(callback: Callable[..., None] | None, steps: int) -> Callable[[dict[str, Any]], None] | None:
    """A host's callback in k-diffusion's form."""
    if callback is None:
        return None
    return lambda state: callback(state["i"], state["denoised"], state["x"], steps)
