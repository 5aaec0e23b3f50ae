"""What the methods share that teach one adapter by the pictures it samples itself: a grid, a reward, previews."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ....sampling.grids import simple
from ....sampling.settings import Settings, setting
from ....sampling.standard import sample_euler
from .contract import Batch, Cond, Draws, LatentReward, Player, TrainableDenoiser, guided


@dataclass(frozen=True)
class SampledConfig(Settings):
    """The sampler of the pictures that are judged."""

    steps: int = setting(20, 1, 1000, help="Steps of the sampler in training; few save time.",
        page="Steps of the sampler in training; the LoRA works with other numbers too.", remedy="20 to 50 are usual")
    cfg: float = setting(4.0, 0, 100, step=0.1, help="Guidance while sampling; 1 halves the time.",
        remedy="1 is no guidance")


def noise_level() -> Any:
    """The setting of a random step that draws a flow model's SDE."""
    return setting(0.7, 0.01, 10, step=0.05, help="sde: how much fresh noise a step adds; 0.7 is the paper's.",
        remedy="0.7 is the paper's")


def at_most(config: Settings, name: str, most: int, remedy: str) -> None:
    """ValueError where a setting is above what another one allows."""
    if getattr(config, name) > most:
        raise ValueError(f"{name} must be at most {most}, got {getattr(config, name)}: {remedy}")


def chosen_steps(draws: Draws, first: int, end: int, count: int) -> list[int]:
    """`count` of the steps first .. end - 1 (0: all; the last one at least), ascending, the same for a whole batch."""
    steps = list(range(min(first, end - 1), end))
    if not count or count >= len(steps):
        return steps
    return sorted(sorted(steps, key=lambda index: draws.common(f"step {index} counts"))[:count])


class Sampled:
    """The parts of an `Objective` that these methods have in common.

    reward: set by the engine before the first step. sigmas: (steps + 1,) levels of the sampler, descending.
    """

    name: str
    needs_latents = False
    pairs = 0

    def __init__(self, denoiser: TrainableDenoiser, steps: int, cfg: float):
        self.denoiser, self.cfg = denoiser, cfg
        self.needs_uncond = cfg != 1
        self.sigmas = simple(denoiser.schedule, steps).to(denoiser.device)
        self.reward: LatentReward | None = None

    @property
    def players(self) -> dict[str, Player]:
        """The student alone; the reference is the network without it."""
        return {"student": Player("student")}

    @property
    def held(self) -> int:
        """Calls of the network whose graphs exist at once, at the most."""
        return 1 if self.cfg == 1 else 2

    def prepare(self, samples: Iterable[Batch]) -> None:
        """Only checks that there is a reward. ValueError where there is none."""
        self.scored()

    def scored(self) -> LatentReward:
        """The reward. ValueError where the engine was given none."""
        if self.reward is None:
            raise ValueError(f"{self.name} learns from a reward, and there is none: connect `reward`")
        return self.reward

    def make_pairs(self, noise: Tensor, cond: Cond, uncond: Cond) -> Tensor:
        """Never called: `pairs` is 0."""
        raise NotImplementedError

    def guided(self, x: Tensor, sigma: Tensor, cond: Cond, uncond: Cond) -> Tensor:
        """x0 (B, ...) of x at sigma (B,) with this method's guidance, by whichever adapter is on."""
        return guided(self.denoiser, x, sigma, cond, uncond, self.cfg)

    def level(self, index: int, count: int) -> Tensor:
        """(count,) times the grid's level."""
        return self.sigmas[index].expand(count)

    def after_step(self, metrics: Mapping[str, float], step: int) -> None:
        """No running averages."""

    def buffers(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def sample(self, noise: Tensor, cond: Cond, uncond: Cond) -> Tensor:
        """Euler on the grid with guidance; without an empty prompt, without guidance."""
        cfg = 1.0 if uncond is None else self.cfg

        def model(x: Tensor, sigma: Tensor) -> Tensor:
            return guided(self.denoiser, x, sigma, cond, uncond, cfg)

        start = self.denoiser.path.unit_start(self.sigmas[0], noise)
        return sample_euler(model, start, self.sigmas, disable=True, path=self.denoiser.path)
