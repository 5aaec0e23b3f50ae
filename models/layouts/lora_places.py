"""Where a LoRA's layers belong: stems of any published spelling against a network's own layers, or without a network.

One mechanism for all families. A network's own names come first, then what its host knows of it (ComfyUI's key map,
diffusers' tables), then the vocabulary, whose lines are applied to the layers that the network has.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from .lora_keys import bare, flat
from .lora_vocabulary import FAMILIES, Family
from .renames import Layout

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """A layer of the network, or some rows of it.

    rows: (first, number), None for all. swapped: the file has the two halves of the rows the other way round.
    """

    layer: str
    rows: tuple[int, int] | None = None
    swapped: bool = False


@dataclass(frozen=True)
class Line:
    """A line of the vocabulary, its groups written out. part: which of `parts` it is: (name, whether it is square)."""

    own: str
    theirs: str
    part: int = 0
    parts: tuple[tuple[str, bool], ...] = ()
    swapped: bool = False

    def rows(self, shape: Shape) -> tuple[int, int] | None:
        """The rows of its part in an own weight of a shape; None where the line means the whole layer."""
        if not self.parts:
            return None
        columns = 1
        for size in shape[1:]:
            columns *= size
        rest = shape[0] - columns * sum(square for _, square in self.parts)
        others = sum(not square for _, square in self.parts)
        sizes = [columns if square else rest // max(1, others) for _, square in self.parts]
        return sum(sizes[: self.part]), sizes[self.part]


_GROUP = re.compile(r"\{([^}]*)\}")
_PARTS = re.compile(r"\[([^]]*)\]")
_NUMBER = re.compile(r"(?<![^._])\d+(?![^._])")


@lru_cache(maxsize=1)
def lines() -> tuple[tuple[Family, tuple[Line, ...]], ...]:
    """The vocabulary, by family."""
    return tuple((family, tuple(_lines(family.lines))) for family in FAMILIES)


def _lines(text: str) -> Iterator[Line]:
    for line in re.sub(r"=\s*\n", "= ", text).strip().splitlines():
        own, _, theirs = (side.strip() for side in line.partition("="))
        theirs = theirs or own
        swapped, theirs = theirs.startswith("~"), theirs.removeprefix("~")
        groups = [
            list(zip(a.split(","), b.split(","), strict=True))
            for a, b in zip(_GROUP.findall(own), _GROUP.findall(theirs), strict=True)
        ]
        for chosen in product(*groups):
            ours = _filled(_GROUP.sub("#0", own), "#0", (a for a, _ in chosen))
            others = _filled(_GROUP.sub("#0", theirs), "#0", (b for _, b in chosen))
            found = _PARTS.search(others)
            if found is None:
                yield Line(ours, others, swapped=swapped)
                continue
            parts = tuple((name.rstrip("!"), name.endswith("!")) for name in found[1].split(","))
            for i, (name, _) in enumerate(parts):
                yield Line(ours, others.replace(found[0], name), i, parts)


def _filled(text: str, mark: str, values: Iterable[str], rest: str = "*") -> str:
    for value in values:
        text = text.replace(mark, value, 1)
    return text.replace("*", rest)


def _template(name: str) -> tuple[str, tuple[str, ...]]:
    """A name with # for its numbers, and they."""
    return _NUMBER.sub("#", name), tuple(_NUMBER.findall(name))


class _Patterns:
    """Lines to be found by one side of theirs."""

    def __init__(self, entries: Iterable[tuple[str, Line]]):
        self._exact: dict[str, list[tuple[tuple[str | None, ...], Line]]] = defaultdict(list)
        self._begin: list[tuple[str, Line]] = []
        for text, line in entries:
            if text.endswith("*"):
                self._begin.append((text[:-1], line))
                continue
            marked = re.sub("#", "\0", text)
            wanted = tuple(None if n == "\0" else n for n in re.findall(r"\0|(?<![^._])\d+(?![^._])", marked))
            self._exact[_NUMBER.sub("#", text)].append((wanted, line))

    def find(self, name: str) -> Iterator[tuple[Line, list[str], str]]:
        """(line, the numbers that its # stand for, what its * stands for) of those that a name fits."""
        template, numbers = _template(name)
        for wanted, line in self._exact.get(template, ()):
            if all(w is None or w == n for w, n in zip(wanted, numbers, strict=True)):
                yield line, [n for w, n in zip(wanted, numbers, strict=True) if w is None], ""
        for begin, line in self._begin:
            if name.startswith(begin):
                yield line, [], name[len(begin) :]


@lru_cache(maxsize=1)
def _by_own() -> _Patterns:
    return _Patterns((line.own, line) for _, some in lines() for line in some)


class Names:
    """The layers of one network, to be found by whatever a file calls them.

    shapes: layer (a bare parameter by its own name) -> shape of its weight. more: further names of places in it.
    """

    def __init__(self, shapes: Mapping[str, Shape], more: Iterable[tuple[str, Place]] = ()):
        self.shapes = shapes
        self._found: dict[str, list[Place]] = defaultdict(list)
        for layer in shapes:
            self._add(layer, Place(layer))
        for name, place in more:
            self._add([*bare(name)][-1], place)
        for layer, shape in shapes.items():
            for line, numbers, rest in _by_own().find(layer):
                self._add(_filled(line.theirs, "#", numbers, rest), Place(layer, line.rows(shape), line.swapped))

    def _add(self, name: str, place: Place) -> None:
        # Flat names are looked for as dotted ones are: where a name is a layer's both ways it is the same layer's.
        for spelt in {name, flat(name)}:
            if place not in self._found[spelt]:
                self._found[spelt].append(place)

    def find(self, stem: str) -> list[Place]:
        """The places that a stem may mean, the likeliest first."""
        for name in bare(stem):
            for spelt in (name, f"{name}.0", name.removesuffix(".0"), flat(name), f"{flat(name)}_0"):
                if spelt in self._found:
                    return self._found[spelt]
        return []


def of_table(table: Layout, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Place]]:
    """diffusers' names of places in a published network, from a table."""
    for layer, targets in table.modules.items():
        if layer not in shapes:
            continue
        sizes = table.rows.get(layer, (shapes[layer][0] // len(targets),) * len(targets))
        first = 0
        for target, size in zip(targets, sizes, strict=True):
            yield target, Place(layer, (first, size) if len(targets) > 1 else None, layer in table.swapped)
            first += size


@lru_cache(maxsize=1)
def _by_theirs() -> tuple[tuple[Family, _Patterns], ...]:
    made = []
    for family, some in lines():
        both = [(line.own, Line(line.own, line.own)) for line in some] + [(line.theirs, line) for line in some]
        made.append((family, _Patterns([*both, *((flat(text), line) for text, line in both if "*" not in text)])))
    return tuple(made)


def _without_network(patterns: _Patterns, stem: str) -> tuple[str, Line] | None:
    """(own name, line) of a stem in one family."""
    for name in bare(stem):
        for spelt in (name, f"{name}.0", f"{name}_0"):
            for line, numbers, rest in patterns.find(spelt):
                return _filled(line.own, "#", numbers, rest), line
    return None


def placed_in(stems: Iterable[str]) -> list[tuple[Family, dict[str, tuple[str, Line]]]]:
    """Families that know most of some stems, with (own name, line) of each that they know; those that agree once."""
    wanted = list(stems)
    scored = []
    for family, patterns in _by_theirs():
        found = {stem: place for stem in wanted if (place := _without_network(patterns, stem)) is not None}
        scored.append((len(found), family, found))
    most = max((count for count, _, _ in scored), default=0)
    best = [(family, found) for count, family, found in scored if count == most and most]
    alike: list[tuple[Family, dict[str, tuple[str, Line]]]] = []
    for family, found in best:
        if not any(family.written == f.written and _same(found, other) for f, other in alike):
            alike.append((family, found))
    return alike


def _same(a: dict[str, tuple[str, Line]], b: dict[str, tuple[str, Line]]) -> bool:
    return {s: (own, x.part, x.parts, x.swapped) for s, (own, x) in a.items()} == {
        s: (own, x.part, x.parts, x.swapped) for s, (own, x) in b.items()
    }


def seems_for(stems: Iterable[str]) -> str:
    """A clause on what some stems seem to be of, empty where no family knows most of them."""
    wanted = list(stems)
    titles = [f.title for f, found in placed_in(wanted) if 2 * len(found) > len(wanted)]
    return f"; by its names it is for {' or '.join(dict.fromkeys(titles))}" if titles else ""
