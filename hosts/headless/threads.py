"""How many threads a small network should take.

torch's threads wait for each other after every layer. Beside another job, on two cores, a step of the embedded network
took 100 times longer with two threads than with one; on an idle machine it gains from them. So it is tried, once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Use this many threads inside the block; changing the number takes half a microsecond."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def quickest(work: Callable[[], object]) -> int:
    """1, or torch's own number of threads: whichever does `work` sooner at present."""
    every = torch.get_num_threads()
    if every == 1:
        return 1

    def seconds(count: int, times: int) -> float:
        with threads(count):
            taken = []
            for _ in range(times):
                began = time.perf_counter()
                work()
                taken.append(time.perf_counter() - began)
            # Several threads that are held up once are held up often in a run: their worst case counts.
            return min(taken) if count == 1 else max(taken)

    work()
    alone = seconds(1, 3)
    if seconds(every, 1) > 4 * alone:
        return 1
    return every if seconds(every, 4) < alone else 1
