"""Batches of a score-matching objective whose levels are all one level."""

from __future__ import annotations

import torch

from retort.trainers.objectives.parts.contract import Batch, alpha_sigma

SCALAR = (1, 1, 1)
MIDDLE = {"low": 0.499, "high": 0.5}  # one level: t = 499, or 0.5 of a flow
FREE = {"normalise": False, "cfg": 1.0}


def at(count: int, cond: float | None = None, uncond: float | None = None, draws=None, **more) -> Batch:
    def told(mean):
        return None if mean is None else {"mean": torch.full((count,), mean)}

    return Batch(draws=draws, shape=more.pop("shape", SCALAR), cond=told(cond), uncond=told(uncond), **more)


def middle(denoiser) -> tuple[float, float]:
    """(alpha, sigma) of the level."""
    sigma = denoiser.levels.drawn(torch.zeros(1), **MIDDLE)
    return tuple(float(v) for v in alpha_sigma(denoiser.path, sigma))
