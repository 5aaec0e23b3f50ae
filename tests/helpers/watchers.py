"""Watchers of runs that several tests use."""

from __future__ import annotations

from retort.trainers.watch import Silent


class StopsAt(Silent):
    """Ends a run after so many steps."""

    def __init__(self, last):
        self.last, self.done = last, 0

    def step(self, done, total, metrics):
        self.done = done

    def commands(self):
        return {"stop"} if self.done == self.last else set()
