"""Several processes that train as one, as the loop sees them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Reducer(Protocol):
    """Several processes that train as one; each sees its share of every step."""

    rank: int
    world: int

    def sum(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over all processes (shares are weighted already), in place."""
        ...

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        ...


class Alone:
    """One process."""

    rank, world = 0, 1

    def sum(self, tensors: list[Tensor]) -> None:
        """Nothing to add up."""

    def any(self, flag: bool) -> bool:
        """What this process says."""
        return flag
