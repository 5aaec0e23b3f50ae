"""What methods share that compare the scores of a frozen teacher and a learnt fake score: settings, samples, losses.

The student's samples are simulated backwards (DMD2, Yin et al. 2024, arXiv 2405.14867, section 4.5); the fake score
learns them by denoising (DMD, Yin et al. 2023, arXiv 2311.18828, section 3.2). A method says what moves a sample.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ....sampling.distilled import Rule, sample_distilled
from ....sampling.parts import WHOLE, Parts
from ....sampling.path import broadcast
from ....sampling.settings import Settings, setting
from ....sampling.standard import default_noise_sampler
from ....sampling.students.preset import MOST_STEPS
from .contract import Batch, Cond, Loss, Objective, Player, Tools, TrainableDenoiser, mean_each
from .grids import check_grid


@dataclass(frozen=True)
class StudentConfig(Settings):
    """The grid of a few-step student, see `grids.student_sigmas`."""

    steps: int = setting(1, 1, MOST_STEPS, help="Calls of the network that the student makes.",
        remedy="a student is worth it at 1 to 8")
    timesteps: str = setting(
        "", help="Its levels, such as 999, 749, 499, 249; empty: an even grid, and 399 for one step of eps models.",
        page="Its levels, as *Distilled Sigmas* takes them. Empty: 999, 749, 499, 249 and the like; 399 for one step "
        "of eps and v models; on flow models even levels behind the model's own shift. Models with a continuous "
        "schedule (SVD, Playground 2.5, Stable Cascade) have no such numbers: leave it empty, and sample with the "
        "`sigmas` of the run's `result.json`, typed into *ManualSigmas*.")

    def check(self) -> None:
        """See the base."""
        super().check()
        check_grid(self.steps, self.timesteps)


@dataclass(frozen=True)
class MatchingConfig(Settings):
    """How student and teacher are compared, and how the fake score keeps up. low, high: places (0 .. 1) of levels."""

    cfg: float = setting(3.0, 1, 100, step=0.1, help="Guidance of the teacher, which the student learns.",
        remedy="1 is the teacher without guidance")
    ratio: int = setting(5, 1, 1000, advanced=True, help="Updates of the fake score for one update of the student.",
        page="Updates of the fake score for one of the student. Only every so many steps does the student move.",
        remedy="5 suits most runs")
    fake_rate: float = setting(1.0, 1e-3, 1e3, advanced=True, step=0.1,
        help="Learning rate of the fake score over the student's.", remedy="1 keeps the student's rate")
    normalise: bool = setting(True, advanced=True, help="Divide each sample's gradient by the teacher's distance.")
    low: float = setting(0.02, 0, 0.99, step=0.01, advanced=True,
        help="Lowest level at which student and teacher are compared, as a share of the schedule.")
    high: float = setting(0.98, 0.01, 1, step=0.01, advanced=True, help="The highest such level.")
    shift: float = setting(1.0, 0.01, 100, step=0.1, advanced=True,
        help="Flow models: above 1 compares more often at high noise.", remedy="1 is uniform")

    def check(self) -> None:
        """See the base."""
        super().check()
        if not self.low < self.high:
            raise ValueError(f"low must be below high, both in 0 to 1, got {self.low!r} and {self.high!r}: 0.02, 0.98")


class Call(NamedTuple):
    """A call of the student: what it is given, at which level (a number, and for every sample)."""

    x: Tensor
    level: float
    sigma: Tensor


class ScoreMatching(Objective):
    """A student and a fake score. sigmas: (steps + 1,) levels of the student's grid, descending to 0."""

    config: MatchingConfig
    student_rule = Rule("renoise")

    def __init__(
        self, config: MatchingConfig, denoiser: TrainableDenoiser, sigmas: Tensor, tools: Tools | None = None
    ):
        if config.shift != 1 and not denoiser.path.flow:
            raise ValueError(f"shift is {config.shift}, and this model is not a flow: set it to 1")
        super().__init__(config, denoiser, tools)
        self.sigmas = sigmas

    @classmethod
    def asks_uncond(cls, config: MatchingConfig) -> bool:
        """See the contract."""
        return config.cfg != 1

    @property
    def players(self) -> dict[str, Player]:
        """The student and the fake score."""
        return {"student": Player("student"), "fake": Player("fake", rate=self.config.fake_rate)}

    @property
    def student_levels(self) -> list[Tensor]:
        """See the contract."""
        return list(self.sigmas[:-1])

    @property
    def keeps_call(self) -> bool:
        """Whether the student's call keeps its graph until it learns, which spares a second one."""
        return not self.graphs_wait(self.config) or self.denoiser.may_wait()

    @property
    def scope(self) -> tuple[float, float]:
        """Places (0 .. 1) of the levels between which student and teacher are compared."""
        return self.config.low, self.config.high

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """Student (every `ratio`-th step), then fake score, on the same samples."""
        call = self._simulate(batch)
        learns = step % self.config.ratio == 0
        made = self._made(batch, call, learns)
        x = made.detach()
        if learns:
            g, metrics = self._gradient(batch, x, call.level)
            yield self._student(batch, call, g, metrics, made)
        del made
        yield self._fake(batch, x)

    @abstractmethod
    def _gradient(self, batch: Batch, x: Tensor, level: float) -> tuple[Tensor, dict[str, Tensor | float]]:
        """(what moves x (B, ...), the student's sample made at `level`, numbers worth watching)."""

    def _made(self, batch: Batch, call: Call, learns: bool) -> Tensor:
        """The student's sample (B, ...), with a graph where it is to learn by it and may keep it so long."""
        with nullcontext() if learns and self.keeps_call else torch.no_grad(), self.denoiser.adapter("student"):
            return self.denoiser.predict_x0(call.x, call.sigma, batch.cond)

    @torch.no_grad()
    def _simulate(self, batch: Batch) -> Call:
        """Backward simulation: the student's own way to the level that it is trained at in this step."""
        draws, levels = batch.draws, self.sigmas.tolist()
        last = int(draws.common("step of the grid") * (len(levels) - 1))
        x = self.denoiser.path.unit_start(levels[0], draws.normal("start", batch.shape))
        with self.denoiser.adapter("student"):
            for i in range(last):
                x0 = self.denoiser.predict_x0(x, self._each(levels[i], len(batch)), batch.cond)
                x = self.denoiser.path.add_noise(x0, levels[i + 1], draws.normal(f"renoise {i + 1}", batch.shape))
        return Call(x, levels[last], self._each(levels[last], len(batch)))

    def _each(self, level: float, count: int) -> Tensor:
        return torch.full((count,), level, device=self.denoiser.device)

    def _levels(self, batch: Batch, name: str) -> Tensor:
        """A level over the whole range for every sample."""
        return self.denoiser.levels.drawn(batch.draws.uniform(name), shift=self.config.shift)

    def _normalised(self, g: Tensor, x: Tensor, teacher: Tensor, parts: Parts = WHOLE) -> Tensor:
        if self.config.normalise:
            g = parts.map(lambda _, g, apart: g / broadcast(mean_each(apart), g), g, (x - teacher).abs())
        else:
            g = parts.own(g)
        # A sample on which the teacher agrees to the last bit, or overflows, has nothing to say.
        return torch.nan_to_num(g, nan=0.0, posinf=0.0, neginf=0.0)

    def _student(
        self, batch: Batch, call: Call, g: Tensor, metrics: dict[str, Tensor | float], x: Tensor | None = None
    ) -> Loss:
        """x: the call's result, which is computed again where it has no graph."""
        if x is None or not x.requires_grad:
            with self.denoiser.adapter("student"):
                x = self.denoiser.predict_x0(call.x, call.sigma, batch.cond)
        return Loss("student", matching_loss(x, g, batch.parts), metrics)

    def _fake(self, batch: Batch, x: Tensor) -> Loss:
        """Denoising score matching on the student's samples (DMD, section 3.2), in what the network itself puts out."""
        sigma = self._levels(batch, "fake level")
        x_t = self.denoiser.path.add_noise(x, sigma, batch.draws.normal("fake noise", batch.shape))
        with self.denoiser.adapter("fake"):
            error = self.denoiser.predict_x0(x_t, sigma, batch.cond) - x
        error = batch.parts.scaled(self.denoiser.parametrisation.scale, sigma, error)
        loss = batch.parts.sum(lambda _, part: part.square().mean(), error)
        return Loss("fake", loss, {"score_loss": loss.detach()})

    def sample(self, noise: Tensor, cond: Cond, uncond: Cond) -> Tensor:
        """See the contract; the noise between steps is the same every time."""
        sigmas = self.sigmas.to(noise.device)
        return sample_distilled(
            lambda x, sigma: self.denoiser.predict_x0(x, sigma, cond),
            self.denoiser.path.unit_start(sigmas[0], noise),
            sigmas,
            disable=True,
            path=self.denoiser.path,
            rule=self.student_rule,
            noise_sampler=default_noise_sampler(noise, seed=0),
        )


def matching_loss(x: Tensor, g: Tensor, parts: Parts = WHOLE) -> Tensor:
    """A number whose gradient to x is g / numel: half the mean square of x from where g would take it.

    Of parts, each in its own size, in which g is too.
    """
    return parts.sum(lambda _, x, g: 0.5 * functional.mse_loss(x, (x - g).detach()), parts.own(x), g)
