"""Baselines of tree search in its frame and its accounting: best-of-N, Feynman-Kac steering, SVDD.

BestOf: N plain samples, the best is kept. Steering: Singhal et al. 2025, "Feynman-Kac steering" (arXiv 2501.06848),
with its potentials "difference", "max" and "add" (the paper's sum); a particle's weight over the whole way is
exp(lambda r(x0)) for each of them. Resampling is systematic, where the effective sample size is low.
Values: Li et al. 2024, "SVDD" (arXiv 2408.08252), with the value of a latent taken as the reward of its x0
(SVDD-PM). Both score the model's x0 halfway, which costs rewards but no calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .search import Run, State, Trajectory
from .settings import Settings, changed, setting
from .tree import TreeConfig, branch_steps

Potential = Literal["difference", "max", "add"]


def _check_steps(at: tuple[int, ...] | None) -> None:
    if at is not None and list(at) != sorted({step for step in at if step > 0}):
        raise ValueError(f"at must ascend and be above 0, since the start is pure noise; got {at!r}")


def check_kind(kind: str) -> None:
    """ValueError for a transition of a kind that draws no noise, which these methods cannot use."""
    if kind == "ode":
        raise ValueError(
            "transition is ode, which draws no noise, so copies of a latent stay equal, and fk and svdd need them to "
            "differ: choose another transition, or the method best_of_n"
        )


def _steps(at: tuple[int, ...] | None, usual: Sequence[int], setting: Mapping[str, Any]) -> tuple[int, ...]:
    """Where a method looks at its particles, checked against the run's steps and transition."""
    steps = len(setting["sigmas"]) - 1
    if at and at[-1] >= steps:
        raise ValueError(f"at must end below the {steps} steps, got {at!r}")
    check_kind(setting["transition"]["kind"])
    return tuple(usual) if at is None else at


def _draw(log_weights: Tensor, count: int, generator: torch.Generator, systematic: bool = True) -> Tensor:
    """(count,) indices in proportion to the weights; systematic: one uniform for all, evenly spread."""
    cumulative = torch.softmax(log_weights, 0).cumsum(0)
    uniform = torch.rand(1 if systematic else count, generator=generator, dtype=torch.float64)
    points = (torch.arange(count) + uniform) / count if systematic else uniform
    return torch.searchsorted(cumulative, points * cumulative[-1], right=True).clamp(max=len(log_weights) - 1)


@dataclass(frozen=True)
class BestOfConfig:
    """Best-of-N has no settings: N is what the budget pays for."""

    def fresh(self, setting: Mapping[str, Any], keep: int = 4) -> BestOf:
        """An empty state."""
        return BestOf(setting, self, keep)


class BestOf(State):
    """Candidates 0, 1, 2, ..., each a plain sample."""

    method = "best-of-n"

    def round(self, run: Run) -> str | None:
        """One batch of candidates, or as many as are paid for."""
        count = max((n for n in range(run.batch + 1) if run.affordable(n * run.steps)), default=0)
        if not count:
            return "calls"
        trajectories = [run.trajectory(self.drawn + i) for i in range(count)]
        run.finish(trajectories)
        for chunk, _ in run.scored(trajectories):
            self.drawn += len(chunk)
        return None


@dataclass(frozen=True)
class SteeringConfig(Settings):
    """particles: k. lam: the paper's lambda (10 to find the best, 1 to sample). potential: see the module. at: steps
    before which particles are scored and resampled; None for the levels that a tree branches at. ess: share of k.
    """

    shown = ("particles", "lam", "potential", "ess")

    particles: int = setting(4, 1, 1_000_000, help="Samples that are drawn side by side.")
    lam: float = changed(TreeConfig, "lam", default=10.0, high=1e6, remedy="10 is the paper's for search")
    potential: Potential = setting("difference", advanced=True, help="What a particle is kept by.")
    at: tuple[int, ...] | None = None
    ess: float = setting(0.5, 0, 1, advanced=True, step=0.05, round=1e-6,
        help="Resample where the effective share of particles is below this.", remedy="0 is never, 1 always")

    def check(self) -> None:
        """See the base."""
        _check_steps(self.at)

    def fresh(self, setting: Mapping[str, Any], keep: int = 4) -> Steering:
        """An empty state. ValueError where the settings do not fit the run."""
        at = _steps(self.at, branch_steps(setting), setting)
        return Steering({**setting, "at": list(at), "particles": self.particles}, self, keep)


class Steering(State):
    """One population after another; of the last finished one, latents (k, ...), rewards and log-weights are kept."""

    method = "fk-steering"

    config: SteeringConfig

    def __init__(self, setting: Mapping[str, Any], config: SteeringConfig, keep: int = 4):
        super().__init__(setting, config, keep)
        self.at = frozenset(self.setting["at"])
        self.latents: Tensor | None = None
        self.rewards = self.log_weights = torch.empty(0, dtype=torch.float64)

    def round(self, run: Run) -> str | None:
        """One population from noise to its end."""
        k, lam = self.config.particles, self.config.lam
        if not run.affordable(k * run.steps):
            return "calls"
        # A slot keeps its generator when another's latent is copied into it, so that copies part.
        trajectories = [run.trajectory(self.drawn + i) for i in range(k)]
        log_weights = torch.zeros(k, dtype=torch.float64)
        # Of each particle's way: the sum of its log-potentials over lambda, and what the next one is made of.
        past = torch.zeros(k, dtype=torch.float64)
        memory = torch.full((k,), -math.inf if self.config.potential == "max" else 0.0, dtype=torch.float64)
        for step in range(run.steps):
            x0 = run.predict(trajectories)
            if step in self.at:
                gained, memory = self._potential(run.halfway(trajectories, x0), memory)
                log_weights, past = log_weights + lam * gained, past + gained
                weights = torch.softmax(log_weights, 0)
                if float(1 / weights.square().sum()) < self.config.ess * k:
                    chosen = _draw(log_weights, k, run.generator(self.drawn, "resample", step))
                    x0, memory, past = x0[chosen.to(x0.device)], memory[chosen], past[chosen]
                    for trajectory, x in zip(trajectories, [trajectories[int(j)].x for j in chosen], strict=True):
                        trajectory.x = x
                    log_weights = torch.zeros_like(log_weights)
            run.move(trajectories, x0)
        rewards: list[float] = []
        for _, some in run.scored(trajectories):
            rewards += some
        self.latents = torch.stack([w.x for w in trajectories]).cpu()
        self.rewards = torch.tensor(rewards, dtype=torch.float64)
        self.log_weights = log_weights + lam * (self.rewards - past)
        self.drawn += k
        return None

    def _potential(self, reward: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(log G over lambda, what the next potential is made of)."""
        if self.config.potential == "difference":
            return reward - memory, reward
        memory = torch.maximum(memory, reward) if self.config.potential == "max" else memory + reward
        return memory, memory

    def draw(self, count: int, seed: int) -> Tensor:
        """`count` latents (with repeats) of the last population by their weights. ValueError while there is none."""
        if self.latents is None:
            raise ValueError("no population is finished yet, so there is nothing to draw from; search first")
        generator = torch.Generator().manual_seed(seed % (1 << 64))
        return self.latents[_draw(self.log_weights, count, generator, systematic=False)]

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See `State.to_file`."""
        tensors, header = super().to_file()
        if self.latents is not None:
            tensors |= {"latents": self.latents, "rewards": self.rewards, "log_weights": self.log_weights}
        return tensors, header

    def restore(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """See `State.restore`."""
        super().restore(tensors, header)
        if "latents" not in tensors:
            return
        latents, rewards, log_weights = (tensors.get(n, torch.empty(0)) for n in ("latents", "rewards", "log_weights"))
        k = int(self.setting["particles"])
        whole = tuple(latents.shape) == (k, *self.setting["shape"]) and rewards.shape == log_weights.shape == (k,)
        if not (whole and all(bool(torch.isfinite(t).all()) for t in (latents, rewards, log_weights))):
            raise ValueError("the population does not hold together")
        self.latents, self.rewards, self.log_weights = latents, rewards, log_weights


@dataclass(frozen=True)
class ValueConfig(Settings):
    """candidates: the paper's M. lam: 1 / alpha of the paper; inf takes the one with the best value. at: steps before
    which to choose; None for all, as in the paper.
    """

    shown = ("candidates",)

    candidates: int = setting(4, 1, 1024, help="Next latents that each step chooses from.")
    lam: float = changed(TreeConfig, "lam", default=math.inf)
    at: tuple[int, ...] | None = None

    def check(self) -> None:
        """See the base."""
        _check_steps(self.at)

    def fresh(self, setting: Mapping[str, Any], keep: int = 4) -> Values:
        """An empty state. ValueError where the settings do not fit the run."""
        steps = len(setting["sigmas"]) - 1
        at = _steps(self.at, range(1, steps), setting)
        return Values({**setting, "at": list(at), "candidates": self.candidates}, self, keep)


class Values(State):
    """SVDD: candidates of the search are its finished samples; each is chosen step by step among M latents."""

    method = "svdd"

    config: ValueConfig

    def __init__(self, setting: Mapping[str, Any], config: ValueConfig, keep: int = 4):
        super().__init__(setting, config, keep)
        self.at = frozenset(self.setting["at"])

    def round(self, run: Run) -> str | None:
        """As many samples as fill a batch with their candidates, or as are paid for."""
        m = self.config.candidates
        cost = run.steps + (m - 1) * len(self.at)
        count = max((n for n in range(max(run.batch // m, 1) + 1) if run.affordable(n * cost)), default=0)
        if not count:
            return "calls"
        samples = [[run.trajectory(self.drawn + i)] for i in range(count)]
        # The first of the M goes on with the sample's own noise: with M = 1 this is the plain sampler.
        spare = [[run.generator(self.drawn + i, "value", j) for j in range(1, m)] for i in range(count)]
        pick = [run.generator(self.drawn + i, "pick") for i in range(count)]
        for step in range(run.steps):
            trajectories = [trajectory for sample in samples for trajectory in sample]
            x0 = run.predict(trajectories)
            if step in self.at and m > 1:
                rewards = run.halfway(trajectories, x0).view(count, m)
                chosen = [i * m + self._choice(rewards[i], pick[i]) for i in range(count)]
                x0 = x0[chosen]
                for i, j in enumerate(chosen):
                    first = trajectories[i * m]
                    samples[i] = [Trajectory(first.number, trajectories[j].x, first.generator, step)]
            if step + 1 in self.at and m > 1:
                for i, sample in enumerate(samples):
                    first = sample[0]
                    samples[i] = [first, *(Trajectory(first.number, first.x, g, first.step) for g in spare[i])]
                x0 = x0.repeat_interleave(m, 0)
            run.move([trajectory for sample in samples for trajectory in sample], x0)
        for chunk, _ in run.scored([sample[0] for sample in samples]):
            self.drawn += len(chunk)
        return None

    def _choice(self, rewards: Tensor, generator: torch.Generator) -> int:
        if math.isinf(self.config.lam):
            return int(rewards.argmax())
        return int(_draw(self.config.lam * rewards, 1, generator)[0])
