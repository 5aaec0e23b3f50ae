"""How far a run has come, told to whoever watches; silent unless someone does. And what nodes say while they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Watcher(Protocol):
    """Someone who shows progress; called often, so it must be quick."""

    def node(self, done: int, total: int, title: str) -> None:
        """`done` of `total` nodes are finished and `title` runs now (empty at the end)."""
        ...

    def step(self, done: int, total: int) -> None:
        """`done` of `total` steps of the running node are finished."""
        ...


_said: ContextVar[list[str] | None] = ContextVar("retort_said", default=None)
_watcher: ContextVar[Watcher | None] = ContextVar("retort_watcher", default=None)


@contextmanager
def watched_by(watcher: Watcher | None) -> Iterator[None]:
    """Tell `watcher` about everything inside the block."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def node(done: int, total: int, title: str) -> None:
    """Tell the watcher which node runs."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher.node(done, total, title)


def step(done: int, total: int) -> None:
    """Tell the watcher how far the running node is."""
    watcher = _watcher.get()
    if watcher is not None:
        watcher.step(done, total)


@contextmanager
def heard() -> Iterator[list[str]]:
    """The lines that nodes say inside the block."""
    lines: list[str] = []
    token = _said.set(lines)
    try:
        yield lines
    finally:
        _said.reset(token)


def say(text: str) -> bool:
    """A line for the user of the run; whether anybody hears it."""
    said = _said.get()
    if said is None:
        return False
    said.append(text)
    return True
