"""A workflow as the runner sees it: nodes with constants and links, whatever file it came from."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from ..files.errors import UsageError


@dataclass(frozen=True)
class Link:
    """The output of another node."""

    node: str
    slot: int


@dataclass(frozen=True)
class Place:
    """Where a constant is stored in the file it came from: a list and index, or a dict and key.

    also: a second place, of a file that holds values by position and by name.
    """

    holder: Any
    key: Any
    also: Place | None = None

    @classmethod
    def named(cls, values: Any, named: Any) -> dict[str, Place]:
        """Values by name, of a file that has them by position too: these count, as in ComfyUI's page.

        Empty where a file has no names, or others than values.
        """
        if not isinstance(values, list) or not isinstance(named, dict) or len(values) != len(named):
            return {}
        return {str(name): cls(values, at, cls(named, name)) for at, name in enumerate(named)}

    def store(self, value: Any) -> None:
        """Put another value there."""
        self.holder[self.key] = value
        if self.also is not None:
            self.also.store(value)


@dataclass
class Node:
    """One node. inputs: dotted name -> constant or Link. places: where the file stores each constant."""

    id: str
    class_type: str
    title: str
    inputs: dict[str, Any] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)


@dataclass
class Graph:
    """nodes by id, in the file's order; document: the UI workflow to embed in images, if there is one.

    notes: what was mended on reading and the user should know.
    """

    nodes: dict[str, Node]
    document: dict | None = None
    notes: list[str] = field(default_factory=list)

    def prompt(self) -> dict[str, Any]:
        """The graph in ComfyUI's API format."""
        return {
            node.id: {
                "class_type": node.class_type,
                "inputs": {name: _api_value(value) for name, value in node.inputs.items()},
                "_meta": {"title": node.title},
            }
            for node in self.nodes.values()
        }

    def assign(self, assignment: str) -> None:
        """Apply NODE.INPUT=VALUE; NODE is an id or a title. UsageError says what there is instead."""
        target, equals, value = assignment.partition("=")
        if not equals or "." not in target:
            raise UsageError(f"--set {assignment!r}: write NODE.INPUT=VALUE, such as --set 3.steps=20")
        cuts = [i for i, c in enumerate(target) if c == "."]
        for cut in cuts:
            wanted, name = target[:cut].strip(), target[cut + 1 :].strip()
            matches = [n for n in self.nodes.values() if wanted == n.id]
            matches = matches or [n for n in self.nodes.values() if wanted == n.title]
            if not matches:
                continue
            if len(matches) > 1:
                ids = ", ".join(n.id for n in matches)
                raise UsageError(f"--set {assignment!r}: {len(matches)} nodes have this title; use an id: {ids}")
            self._set(matches[0], name, value, assignment)
            return
        known = ", ".join(f'{n.id} "{n.title}"' for n in list(self.nodes.values())[:12])
        raise UsageError(f"--set {assignment!r}: no node has this id or title; there are {known or 'no nodes'}")

    def set_seed(self, seed: int) -> None:
        """Give every seed in the graph this value. UsageError when there is none."""
        found = False
        for node in self.nodes.values():
            for name in ("seed", "noise_seed"):
                if name in node.inputs and not isinstance(node.inputs[name], Link):
                    self._store(node, name, seed)
                    found = True
        if not found:
            raise UsageError('--seed: no node has an input "seed" or "noise_seed" with a value of its own')

    def _set(self, node: Node, name: str, value: str, assignment: str) -> None:
        if name not in node.inputs:
            known = ", ".join(n for n, v in node.inputs.items() if not isinstance(v, Link))
            raise UsageError(f'--set {assignment!r}: node {node.id} "{node.title}" has no such input; it has {known}')
        old = node.inputs[name]
        if isinstance(old, Link):
            raise UsageError(
                f"--set {assignment!r}: this input is connected to node {old.node}; set the value there instead"
            )
        self._store(node, name, _parsed(value, old))

    def _store(self, node: Node, name: str, value: Any) -> None:
        node.inputs[name] = value
        place = node.places.get(name)
        if place is None:
            return
        place.store(value)
        # A primitive node may feed several inputs from one stored value.
        for other in self.nodes.values():
            for input, its in other.places.items():
                if its.holder is place.holder and its.key == place.key:
                    other.inputs[input] = value


def _api_value(value: Any) -> Any:
    if isinstance(value, Link):
        return [value.node, value.slot]
    # A list would read as a link.
    return {"__value__": value} if isinstance(value, list) else copy.deepcopy(value)


def _parsed(text: str, old: Any) -> Any:
    """The text as the kind of value that it replaces; what does not fit stays text, for validation to name."""
    if isinstance(old, bool):
        return {"true": True, "false": False, "1": True, "0": False}.get(text.strip().lower(), text)
    for kind in (int, float):
        if isinstance(old, int | float) and not isinstance(old, str):
            try:
                return kind(text)
            except ValueError:
                continue
    return text
