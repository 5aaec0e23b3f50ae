"""How many batches a step takes: a fixed number, or one that grows with the gradient's noise (AdAdaGrad)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .config import TrainingConfig
from .objectives.parts.batch_growth import GradientNoise, gradient_noise, next_accumulation
from .processes import Reducer

# One step's estimate scatters widely; averages of its two parts do not.
MEMORY = 0.9


class Accumulation:
    """count: batches that the next step is to take. It never shrinks."""

    def __init__(self, settings: TrainingConfig):
        self._settings = settings
        self.count = settings.accumulation
        self._noise: GradientNoise | None = None

    @property
    def grows(self) -> bool:
        """Whether steps must be watched."""
        return self._settings.noise_scale_target > 0

    @property
    def groups(self) -> int:
        """How many times the configured batch a step takes."""
        return max(1, self.count // self._settings.accumulation)

    def saw(self, squares: list[Tensor], norm: float, reducer: Reducer) -> dict[str, float]:
        """Learn from a step: the squared gradient norm of each micro-batch here, and the norm of the mean of all."""
        values = torch.zeros(reducer.world, len(squares), device=squares[0].device)
        values[reducer.rank] = torch.stack(squares)
        reducer.sum([values])
        now = gradient_noise(values.flatten().tolist(), (norm * values.numel()) ** 2)
        old = self._noise or now
        self._noise = GradientNoise(*(MEMORY * o + (1 - MEMORY) * n for o, n in zip(old, now, strict=True)))
        settings = self._settings
        self.count = next_accumulation(self._noise, self.count, settings.noise_scale_target, settings.accumulation_cap)
        return {"gradient_noise": self._noise.variance, "accumulation": float(self.count)}

    def saved(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"count": self.count, "noise": self._noise}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take back what `saved` gave."""
        self.count = saved["count"]
        self._noise = None if saved["noise"] is None else GradientNoise(*saved["noise"])


def square(after: list[Tensor], before: list[Tensor]) -> Tensor:
    """The squared length () of what was added to a gradient, given in parts."""
    return torch.stack([(a - b).square().sum() for a, b in zip(after, before, strict=True)]).sum()
