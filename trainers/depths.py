"""A deep network told by shallow ones: equal blocks take equal memory, so bytes and operations grow evenly with them.

What is counted at each place (the first block of a row of equal ones, the last, every other block, the optimiser) is
linear in the numbers of equal blocks before and after it. So it is counted with two of each, then with three of one
kind after another, and the real numbers follow; the most of all places is taken afterwards, since that alone is not
linear. What lies between a row's first and last is never more than the larger of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

FEW = 2
# Rows that are hardly longer than what would be run instead are left whole.
WORTH = 4


@dataclass(frozen=True)
class Row:
    """Equal blocks that follow each other in a list of the network: the list's name, and which of its entries."""

    owner: str
    begin: int
    count: int

    def names(self) -> list[str]:
        """The blocks' names."""
        return [f"{self.owner}.{i}" for i in range(self.begin, self.begin + self.count)]


@dataclass(frozen=True)
class Kind:
    """Rows of the same blocks and the same length, which grow together."""

    rows: tuple[Row, ...]

    @property
    def count(self) -> int:
        """Blocks in each row."""
        return self.rows[0].count


def kinds(network: nn.Module) -> list[Kind]:
    """The kinds of blocks that a network repeats so often that not all of them need be run."""
    found: dict[Any, list[Row]] = {}
    inside: list[str] = []
    for name, module in network.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(outer) for outer in inside):
            continue
        signs = [_sign(child) for child in module]
        begin = 0
        for place in range(1, len(signs) + 1):
            if place < len(signs) and signs[place] == signs[begin]:
                continue
            if place - begin >= WORTH:
                row = Row(name, begin, place - begin)
                found.setdefault((signs[begin], row.count), []).append(row)
                inside += [f"{block}." for block in row.names()]
            begin = place
    return [Kind(tuple(rows)) for rows in found.values()]


def _sign(module: nn.Module) -> Any:
    """What makes two blocks equal: their classes, and the shapes and types of their weights."""
    weights = tuple((name, tuple(w.shape), w.dtype) for name, w in module.named_parameters())
    return type(module), tuple(type(part) for part in module.modules()), weights


def left_out(network: nn.Module, kinds: Sequence[Kind], kept: Sequence[int]) -> list[nn.Module]:
    """The blocks that are not run when of each kind's rows only so many are."""
    found = []
    for kind, count in zip(kinds, kept, strict=True):
        for row in kind.rows:
            found += [network.get_submodule(name) for name in row.names()[count:]]
    return found


def roles(kinds: Sequence[Kind], kept: Sequence[int]) -> dict[str, str]:
    """Names of places by the names that blocks have when of each kind's rows only so many are there.

    Rows of one list move up where another of the list has become shorter.
    """
    found: dict[str, str] = {}
    rows = sorted(
        (row.owner, row.begin, row.count, count) for kind, count in zip(kinds, kept, strict=True) for row in kind.rows
    )
    moved: dict[str, int] = {}
    for owner, begin, count, left in rows:
        start = begin - moved.get(owner, 0)
        for i in range(left):
            place = "first" if i == 0 else "last" if i == left - 1 else "between"
            found[f"{owner}.{start + i}"] = f"{owner}.{begin} {place}"
        moved[owner] = moved.get(owner, 0) + count - left
    return found


def extrapolated(count: Callable[[Sequence[int]], Mapping[str, float]], real: Sequence[int]) -> dict[str, float]:
    """Numbers by place at the real depths, from those that `count` gives at small ones.

    Places are those of the smallest network; what lies between a row's first and last is not among them.
    """
    base = [FEW] * len(real)
    at = dict(count(base))
    out = dict(at)
    for number, depth in enumerate(real):
        more = count([few + (i == number) for i, few in enumerate(base)])
        for place, value in at.items():
            out[place] += (more[place] - value) * (depth - FEW)
    return out
