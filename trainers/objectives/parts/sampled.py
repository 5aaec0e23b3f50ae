"""What the methods share that teach one adapter by the pictures it samples itself: a grid, a reward, previews."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ....sampling.grids import simple
from ....sampling.settings import Settings, setting
from .contract import (
    Batch,
    Cond,
    Draws,
    LatentReward,
    Objective,
    Rewards,
    Tools,
    TrainableDenoiser,
    guided,
    guided_each,
    sample_guided,
)


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


class Sampled(Objective):
    """The parts of an `Objective` that these methods have in common. sigmas: (steps + 1,) levels of the sampler."""

    needs = frozenset({"reward"})
    rewards: ClassVar[Rewards] = "any"
    config: SampledConfig

    def __init__(self, config: SampledConfig, denoiser: TrainableDenoiser, tools: Tools | None = None):
        super().__init__(config, denoiser, tools)
        self.cfg = config.cfg
        self.sigmas = simple(denoiser.schedule, config.steps).to(denoiser.device)

    @classmethod
    def asks_uncond(cls, config: SampledConfig) -> bool:
        """See the contract."""
        return config.cfg != 1

    def scored(self) -> LatentReward:
        """The reward, which `prepare` has asked for."""
        assert self.reward is not None
        return self.reward

    def guided(self, x: Tensor, sigma: Tensor, cond: Cond, uncond: Cond) -> Tensor:
        """x0 (B, ...) of x at sigma (B,) with this method's guidance, by whichever adapter is on."""
        return guided(self.denoiser, x, sigma, cond, uncond, self.cfg)

    def guided_each(self, xs: Sequence[Tensor], sigma: Tensor, batch: Batch) -> list[Tensor]:
        """The same of several x (B, ...) at one level, in calls as large as one picture of 1024 px."""
        count = self.together(xs[0])
        groups = [xs[first : first + count] for first in range(0, len(xs), count)]
        given = sigma, batch.cond, batch.uncond, self.cfg
        return [x0 for group in groups for x0 in guided_each(self.denoiser, group, *given)]

    def together(self, x: Tensor) -> int:
        """How many guided calls on samples like x (B, ...) make one of that size; at least 1."""
        return max(1, self.denoiser.fitting(x) // (1 if self.cfg == 1 else 2))

    def level(self, index: int, count: int) -> Tensor:
        """(count,) times the grid's level."""
        return self.sigmas[index].expand(count)

    def sample(self, noise: Tensor, cond: Cond, uncond: Cond) -> Tensor:
        """Euler on the grid with guidance; without an empty prompt, without guidance."""
        return sample_guided(self.denoiser, self.sigmas, noise, cond, uncond, self.cfg)
