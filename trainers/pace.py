"""How fast a card works before a run has taken a step on it: by a trial of milliseconds."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

# A training step reaches about this share of the speed of one large matrix product: it also normalises, attends and
# waits for memory. A rough figure, which a run's first step replaces.
REACHED = 0.5
FIRST, LARGEST = 512, 4096  # sides of the matrices
ENOUGH = 0.003  # seconds after which a larger product would say no more
COPIED = 32 * 2**20  # bytes


class Pace(NamedTuple):
    """speed: operations a second that training reaches; bus: bytes a second from pinned memory, None where unknown."""

    speed: float
    bus: float | None = None


@functools.lru_cache(maxsize=8)
def tried(device: torch.device, compute: torch.dtype) -> Pace | None:
    """A card's pace in this precision; None for one that cannot be tried. Takes some 100 MB there, for that long."""
    try:
        with torch.inference_mode():
            return Pace(_product(device, compute) * REACHED, _copy(device))
    except (RuntimeError, NotImplementedError):  # no memory left, or no such product
        return None


def _product(device: torch.device, compute: torch.dtype) -> float:
    """Operations a second of a product of matrices."""
    side = FIRST
    while True:
        left, right = (torch.ones(side, side, dtype=compute, device=device) for _ in range(2))
        seconds = _least(device, lambda a=left, b=right: a @ b)  # type: ignore[misc]
        if seconds >= ENOUGH or side == LARGEST:
            return 2 * side**3 / seconds
        side *= 2


def _copy(device: torch.device) -> float | None:
    """Bytes a second of copies to the card; None where nothing can be pinned."""
    try:
        source = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:
        return None
    there = torch.empty(COPIED, dtype=torch.uint8, device=device)
    return COPIED / _least(device, lambda: there.copy_(source, non_blocking=True))


def _least(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of the quickest of three, after one that makes things ready."""
    taken = []
    for _ in range(4):
        torch.accelerator.synchronize(device)
        began = time.perf_counter()
        work()
        torch.accelerator.synchronize(device)
        taken.append(time.perf_counter() - began)
    return max(min(taken[1:]), 1e-9)
