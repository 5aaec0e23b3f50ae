"""Subgraphs of the UI format, unfolded: node N of instance I becomes "I:N", as ComfyUI's editor queues it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..files.errors import UsageError
from .graph import Place

# How litegraph numbers the two ends of a subgraph among the nodes within.
INPUT, OUTPUT = "-10", "-20"
MUTED, BYPASSED = 2, 4
# A file that holds itself thirty times over is no workflow; each level is a frame of Python's stack.
MOST_INSTANCES, DEEPEST = 300, 30
AGAIN = "Save the workflow again from ComfyUI"


def has_subgraphs(document: Any) -> bool:
    """Whether a node of the document is an instance of one of its subgraph definitions."""
    if not isinstance(document, dict):
        return False
    nodes = document.get("nodes")
    kinds = [n.get("type") for n in nodes if isinstance(n, dict)] if isinstance(nodes, list) else []
    return any(id in kinds for id in _definitions(document))


def unfold(document: dict[str, Any]) -> Flat:
    """All nodes of a UI-format document in one graph. UsageError where it is not what ComfyUI saves."""
    flat = Flat()
    _Graph(document, _definitions(document)).spread(flat)
    return flat


@dataclass
class Flat:
    """nodes by id; links: id -> (source node, slot); widgets: sources that are values typed on an instance."""

    nodes: dict[str, dict] = field(default_factory=dict)
    links: dict[Any, tuple[str, int]] = field(default_factory=dict)
    widgets: dict[str, Place] = field(default_factory=dict)


def _definitions(document: dict[str, Any]) -> dict[str, dict]:
    definitions = document.get("definitions")
    found = definitions.get("subgraphs") if isinstance(definitions, dict) else None
    if not isinstance(found, list):
        return {}
    return {s["id"]: s for s in found if isinstance(s, dict) and isinstance(s.get("id"), str)}


class _Graph:
    """The document itself, or one instance (`host`) of a subgraph within `parent`."""

    def __init__(
        self,
        content: dict,
        definitions: dict[str, dict],
        parent: _Graph | None = None,
        host: dict | None = None,
    ):
        self.content, self.parent, self.host = content, parent, host
        self.root: _Graph = self if parent is None else parent.root
        self.made = 0
        self.prefix: str = "" if parent is None or host is None else f"{parent.prefix}{host['id']}:"
        self.kinds: tuple[str, ...] = () if parent is None else (*parent.kinds, content["id"])
        self.nodes = _nodes(content, self.prefix)
        self.links: dict[Any, tuple[str, int]] = {}
        self.ends: dict[int, Any] = {}
        for id, source, slot, target, target_slot in _links(content):
            self.links[id] = (source, slot)
            if target == OUTPUT and isinstance(target_slot, int):
                self.ends[target_slot] = id
        self.instances: dict[str, _Graph] = {}
        for id, raw in self.nodes.items():
            if raw["type"] in definitions and raw.get("mode") not in (MUTED, BYPASSED):
                if raw["type"] in self.kinds:
                    raise UsageError(f"the subgraph of node {self.prefix}{id} holds itself. {AGAIN}")
                self.root.made += 1
                if self.root.made > MOST_INSTANCES or len(self.kinds) >= DEEPEST:
                    raise UsageError(
                        f"more than {MOST_INSTANCES} subgraphs, or {DEEPEST} within each other, are not unfolded. In "
                        "ComfyUI use Workflow > Export (API)"
                    )
                self.instances[id] = _Graph(definitions[raw["type"]], definitions, self, raw)

    def spread(self, flat: Flat) -> None:
        """Put the nodes and what they are linked to into `flat`."""
        for id, raw in self.nodes.items():
            if id in self.instances:
                self.instances[id].spread(flat)
                continue
            inputs = raw.get("inputs")
            if isinstance(inputs, list):
                raw = {**raw, "inputs": [self.linked(one, flat) for one in inputs]}
            flat.nodes[self.prefix + id] = {**raw, "id": self.prefix + id}

    def linked(self, input: Any, flat: Flat) -> Any:
        """An input of a node with its link as `flat` knows it."""
        link = input.get("link") if isinstance(input, dict) else None
        if not isinstance(link, int | str):
            return input
        name = f"{self.prefix}{link}" if self.prefix else link
        if link not in self.links:
            return {**input, "link": name}
        source = self.source(link, set())
        if source is None:
            return {**input, "link": None}
        if isinstance(source, Place):
            flat.widgets[f"widget of link {name}"] = source
            source = (f"widget of link {name}", 0)
        flat.links[name] = source
        return {**input, "link": name}

    def source(self, link: Any, seen: set) -> tuple[str, int] | Place | None:
        """Where a link comes from: a node and its slot, a value typed on an instance, or nothing."""
        if (self.prefix, link) in seen:
            raise UsageError(f"link {self.prefix}{link} goes round in a ring through subgraphs. Cut the ring")
        seen.add((self.prefix, link))
        id, slot = self.links[link]
        if id == INPUT and self.parent is not None:
            return self.parent.given(self, slot, seen)
        if id in self.instances:
            inside = self.instances[id]
            return inside.source(inside.ends[slot], seen) if slot in inside.ends else None
        return self.prefix + id, slot

    def given(self, instance: _Graph, slot: int, seen: set) -> tuple[str, int] | Place | None:
        """What an instance gets at a slot. Without a link or a typed value the node within keeps its own."""
        slots, host = instance.content.get("inputs"), instance.host or {}
        if not isinstance(slots, list) or not 0 <= slot < len(slots) or not isinstance(slots[slot], dict):
            raise UsageError(f"the subgraph of node {instance.prefix[:-1]} has no input {slot}. {AGAIN}")
        inputs = [one for one in host.get("inputs") or [] if isinstance(one, dict)]
        typed = [one for one in inputs if one.get("widget")]
        for one in inputs:
            if one.get("name") == slots[slot].get("name"):
                if isinstance(one.get("link"), int | str) and one["link"] in self.links:
                    return self.source(one["link"], seen)
                values = host.get("widgets_values")
                at = typed.index(one) if one in typed else None
                if at is not None and isinstance(values, list) and at < len(values) and values[at] is not None:
                    return Place(values, at)
        return None


def _nodes(content: dict, prefix: str) -> dict[str, dict]:
    """The nodes of one graph by id."""
    listed = content.get("nodes")
    if not isinstance(listed, list):
        raise UsageError(f'the subgraph of node {prefix[:-1]} has no list "nodes". {AGAIN}')
    found: dict[str, dict] = {}
    for i, raw in enumerate(listed):
        if (
            not isinstance(raw, dict)
            or not isinstance(raw.get("id"), int | str)
            or not isinstance(raw.get("type"), str)
        ):
            raise UsageError(f'"nodes"[{i}] has no "id" or no "type". {AGAIN}')
        if str(raw["id"]) in found:
            raise UsageError(f"two nodes have the id {raw['id']}. {AGAIN}")
        found[str(raw["id"])] = raw
    return found


def _links(content: dict) -> Iterator[tuple[Any, str, int, str, Any]]:
    """(link id, source node, its slot, target node, its slot)."""
    raw_links = content.get("links") or []
    if not isinstance(raw_links, list):
        raise UsageError(f'"links" must be a list. {AGAIN}')
    for i, raw in enumerate(raw_links):
        if raw is None:
            continue  # litegraph leaves holes
        if isinstance(raw, list) and len(raw) >= 5:
            id, source, slot, target, target_slot = raw[:5]
        elif isinstance(raw, dict):
            id, source, slot = raw.get("id"), raw.get("origin_id"), raw.get("origin_slot")
            target, target_slot = raw.get("target_id"), raw.get("target_slot")
        else:
            raise UsageError(f'"links"[{i}] is neither [id, from, slot, to, slot, type] nor an object. {AGAIN}')
        if not isinstance(id, int | str) or not isinstance(source, int | str) or not isinstance(slot, int):
            raise UsageError(f'"links"[{i}] names no link id, source node or slot. {AGAIN}')
        yield id, str(source), slot, str(target), target_slot
