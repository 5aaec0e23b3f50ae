"""Several rewards as one: weights, standard scores, limits, and a veto.

A standard score is fixed when it is made, from numbers or from a calibration batch, so a picture's score depends on no
other picture. `RunningScore` is the exception and says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .contract import Reward
from .scoring import each, score


@dataclass(frozen=True)
class Term:
    """One of several rewards.

    weight: of its (standardised, limited) score. mean, std: what is taken off and divided by. low, high: limits of the
    standardised score. veto: a raw score below it gives the whole sum `Combined.vetoed`; None for no veto.
    """

    reward: Reward
    weight: float = 1.0
    mean: float = 0.0
    std: float = 1.0
    low: float = -math.inf
    high: float = math.inf
    veto: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"weight {self.weight} of {self.reward.name} must be a finite number")
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(
                f"mean {self.mean} and std {self.std} of {self.reward.name} must be finite, std above 0: calibrate on "
                "pictures that differ"
            )
        if not self.low < self.high:
            raise ValueError(f"limits of {self.reward.name} are {self.low} to {self.high}: the first must be lower")

    def standardised(self, raw: Tensor) -> Tensor:
        """Scores (B,) -> (B,), before the weight."""
        return ((raw - self.mean) / self.std).clamp(self.low, self.high)

    @property
    def range(self) -> tuple[float, float]:
        """Of the weighted score."""
        ends = (max(self.low, min(self.high, (v - self.mean) / self.std)) for v in self.reward.range)
        # Nothing times infinity is nothing here, not NaN.
        low, high = sorted(self.weight * v if self.weight else 0.0 for v in ends)
        return low, high


@torch.no_grad()
def statistics(reward: Reward, images: Tensor, prompts: str | Sequence[str], batch: int = 8) -> tuple[float, float]:
    """Mean and standard deviation of a reward over calibration images (B, H, W, 3), B at least 2.

    ValueError when they are too few, or all score alike.
    """
    if len(images) < 2:
        raise ValueError(f"calibration has {len(images)} image: give at least two, better sixteen, of usual quality")
    found = score(reward, images, prompts, batch).double()
    std = float(found.std())
    if std <= 1e-9 * max(1.0, float(found.abs().max())):
        raise ValueError(f"all calibration images score {float(found[0]):g} in {reward.name}: give ones that differ")
    return float(found.mean()), std


@dataclass(eq=False)
class Combined:
    """sum of weight * standardised score; `vetoed` where any term's raw score falls below its veto.

    vetoed: finite, since searches refuse infinite scores; None for the lowest value that the sum can have less 1, or
    -1e4 where it has none.
    """

    terms: tuple[Term, ...]
    vetoed: float | None = None
    name: str = ""
    differentiable: bool = field(init=False)
    range: tuple[float, float] = field(init=False)

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("there are no rewards to combine: connect at least one")
        self.name = self.name or " + ".join(f"{t.weight:g} {t.reward.name}" for t in self.terms)
        self.differentiable = all(t.reward.differentiable for t in self.terms if t.weight)
        low, high = (sum(t.range[i] for t in self.terms) for i in (0, 1))
        if any(t.veto is not None for t in self.terms):
            if self.vetoed is None:
                self.vetoed = low - 1 if math.isfinite(low) else -1e4
            elif not math.isfinite(self.vetoed):
                raise ValueError(f"vetoed {self.vetoed} must be a finite number, such as -100")
            low = min(low, self.vetoed)
        self.range = (low, high)

    def __call__(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """(B,) fp32."""
        words = each(prompts, len(images))
        total = torch.zeros(len(images), device=images.device)
        refused = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        for term in self.terms:
            if not term.weight and term.veto is None:
                continue
            raw = score(term.reward, images, words)
            if term.weight:
                total = total + term.weight * term.standardised(raw)
            if term.veto is not None:
                refused = refused | (raw < term.veto)
        return torch.where(refused, torch.full_like(total, self.vetoed or 0.0), total)


class RunningScore:
    """A reward's standard score by everything that it has seen before this call: for training, where rewards drift.

    The pictures of one call do not change each other's score, but the calls before do, so a search or a comparison
    wants `Term.mean` and `Term.std` instead. Until `least` pictures are seen, scores come out as they are.
    """

    def __init__(self, reward: Reward, least: int = 16):
        if least < 2:
            raise ValueError(f"least {least} must be at least 2: one picture has no deviation")
        self.reward, self.least = reward, least
        self.name, self.differentiable = f"running {reward.name}", reward.differentiable
        self.range = (-math.inf, math.inf)
        self.seen, self.mean, self._squares = 0, 0.0, 0.0

    @property
    def std(self) -> float:
        """Of what was seen; 1 before there is any."""
        return math.sqrt(self._squares / (self.seen - 1)) if self.seen > 1 and self._squares > 0 else 1.0

    def __call__(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """(B,) fp32."""
        raw = score(self.reward, images, prompts)
        scored = (raw - self.mean) / self.std if self.seen >= self.least else raw
        # Welford's update, so that large means lose no digits.
        for value in raw.detach().double().tolist():
            self.seen += 1
            before = value - self.mean
            self.mean += before / self.seen
            self._squares += before * (value - self.mean)
        return scored
