"""Settings that methods share which compare the scores of a frozen teacher and a learnt fake score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ....sampling.settings import Settings, setting
from .grids import check_grid

GanOn = Literal["teacher", "fake"]


@dataclass(frozen=True)
class StudentConfig(Settings):
    """The grid of a few-step student, see `grids.student_sigmas`."""

    steps: int = setting(1, 1, 100, help="Calls of the network that the student makes.",
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
    ratio: int = setting(5, 1, 1000, help="Updates of the fake score for one update of the student.",
        page="Updates of the fake score for one of the student. Only every so many steps does the student move.",
        remedy="5 suits most runs")
    fake_rate: float = setting(1.0, 1e-3, 1e3, step=0.1,
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


@dataclass(frozen=True)
class GanConfig(Settings):
    """A discriminator beside the matching. gan_on: whose features it sees."""

    gan_weight: float = setting(0.0, 0, 100, step=0.001, round=1e-5,
        help="Weight of the discriminator, which needs images; 0 for none. Published runs: 0.001 to 0.03.",
        remedy="0 is no GAN, 0.005 is SDXL's")
    gan_on: GanOn = setting("teacher",
        help="Whose features the discriminator sees: the frozen teacher's, or the fake score's, which it then trains.")
