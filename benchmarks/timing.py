"""Times of two actions side by side, and their ratio with an interval."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from .report import Figure


def ratio(ours: list[float], theirs: list[float], target: float) -> Figure:
    """Median of the pairs' ratios, and the 95 % interval of the median by the binomial (order statistics)."""
    pairs = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    n = len(pairs)
    # Ranks whose binomial(n, 1/2) tails hold 2.5 % each.
    reach = int(0.98 * n**0.5) + 1
    low, high = max(0, n // 2 - reach), min(n - 1, n // 2 + reach)
    return Figure(statistics.median(pairs), target=target, interval=(pairs[low], pairs[high]))


def paired(first: Callable[[], None], second: Callable[[], None], pairs: int) -> tuple[list[float], list[float]]:
    """Seconds of both, alternating which goes first, after one warm-up each."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(pairs + 1):
        order = ((0, first), (1, second)) if i % 2 else ((1, second), (0, first))
        for which, action in order:
            began = time.perf_counter()
            action()
            times[which].append(time.perf_counter() - began)
    return times[0][1:], times[1][1:]
