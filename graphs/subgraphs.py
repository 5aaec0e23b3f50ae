"""Subgraphs of the UI format, unfolded: node N of instance I becomes "I:N", as ComfyUI's editor queues it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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


def unfold(document: dict[str, Any], widgets: Widgets | None = None) -> Flat:
    """All nodes of a UI-format document in one graph. UsageError where it is not what ComfyUI saves.

    widgets: a node's widgets, where its class is known; without it, what the file says of its inputs counts. By them
    ComfyUI's page decides to which input of a subgraph a value typed on it belongs, and what stands there if none is.
    """
    flat = Flat()
    _Graph(document, _definitions(document), widgets).spread(flat)
    return flat


# The widgets of a node as the file has it, and where their values are; None for a class that is not known.
Widgets = Callable[[dict[str, Any]], Mapping[str, Place] | None]


@dataclass
class Flat:
    """nodes by id; links: id -> (source node, slot); widgets: sources that are values typed on an instance.

    primitives: primitive nodes whose value is typed on an instance.
    """

    nodes: dict[str, dict] = field(default_factory=dict)
    links: dict[Any, tuple[str, int]] = field(default_factory=dict)
    widgets: dict[str, Place] = field(default_factory=dict)
    primitives: dict[str, Place] = field(default_factory=dict)


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
        widgets: Widgets | None = None,
        parent: _Graph | None = None,
        host: dict | None = None,
        typed: dict[str, Place] | None = None,
    ):
        self.content, self.parent, self.host = content, parent, host
        self.definitions, self.widgets = definitions, widgets
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
        # What is typed on the instance: by name of the subgraph's input, and by (node, widget) within.
        self.typed: dict[str, Place] = {}
        self.inner: dict[tuple[str, str], Place] = {}
        if host is not None:
            self._typed(host, typed or {})
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
                handed = {widget: place for (node, widget), place in self.inner.items() if node == id}
                self.instances[id] = _Graph(definitions[raw["type"]], definitions, widgets, self, raw, handed)

    def spread(self, flat: Flat) -> None:
        """Put the nodes and what they are linked to into `flat`."""
        for id, raw in self.nodes.items():
            if id in self.instances:
                self.instances[id].spread(flat)
                continue
            inputs = raw.get("inputs")
            if isinstance(inputs, list):
                raw = {**raw, "inputs": [self.linked(one, flat) for one in inputs]}
            for (node, widget), place in self.inner.items():
                if node == id:
                    raw = self.overridden(raw, widget, place, flat)
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
        name = slots[slot].get("name")
        for one in _dicts(host.get("inputs")):
            if one.get("name") == name and isinstance(one.get("link"), int | str) and one["link"] in self.links:
                return self.source(one["link"], seen)
        return instance.typed.get(name)

    def overridden(self, raw: dict, widget: str, place: Place, flat: Flat) -> dict:
        """A node within whose widget has a value that is typed on the instance, unless something is linked to it."""
        id = f"{self.prefix}{raw['id']}"
        if raw["type"] == "PrimitiveNode":
            flat.primitives[id] = place
            return raw
        inputs = list(raw.get("inputs") or [])
        if any(isinstance(one, dict) and one.get("name") == widget and one.get("link") is not None for one in inputs):
            return raw
        source = f"widget {widget} of node {id}"
        flat.widgets[source], flat.links[source] = place, (source, 0)
        others = [one for one in inputs if not (isinstance(one, dict) and one.get("name") == widget)]
        return {**raw, "inputs": [*others, {"name": widget, "link": source}]}

    def _typed(self, host: dict, handed: dict[str, Place]) -> None:
        """Find out what each value in the instance's "widgets_values" belongs to.

        handed: by widget name, what an instance around this one says instead.
        """
        values = host.get("widgets_values")
        values = values if isinstance(values, list) else []
        properties = host.get("properties")
        promoted = properties.get("proxyWidgets") if isinstance(properties, dict) else None
        slots = [one for one in _dicts(self.content.get("inputs")) if isinstance(one.get("name"), str)]
        named = Place.named(values, host.get("widgets_values_named"))
        if isinstance(promoted, list):
            # Editors up to autumn 2026 list what is promoted, in the order of the values: [node within, its widget], or
            # [-1, input of the subgraph].
            for at, entry in enumerate(promoted):
                if isinstance(entry, list) and len(entry) > 1 and isinstance(entry[1], str):
                    self._give(str(entry[0]), entry[1], slots, handed.get(entry[1]) or _place(values, at))
        elif self.widgets is not None and named:
            self.typed = {name: handed.get(name) or place for name, place in named.items()}
        else:
            # Without a list the values are those of the inputs that are widgets, in their order.
            names = [one["name"] for one in _dicts(host.get("inputs")) if one.get("widget") and "name" in one]
            if self.widgets is not None or not names:
                names = [one["name"] for one in slots if self._widget_of(one)[0]]
            for at, name in enumerate(names):
                place = handed.get(name) or _place(values, at)
                if place is not None:
                    self.typed[name] = place
        for slot in slots if self.widgets is not None else ():
            # All that an input leads to gets what stands in the first widget.
            place = self._widget_of(slot)[1]
            if place is not None:
                self.typed.setdefault(slot["name"], place)

    def _widget_of(self, slot: dict) -> tuple[bool, Place | None]:
        """Whether an input of the subgraph leads to a widget, through subgraphs within too, and where its value is."""
        if self.widgets is None:
            return bool(self._targets(slot)), None
        ends = (_widget(self.nodes[id], name, self.definitions, self.widgets) for id, name in self._ends(slot))
        return next((end for end in ends if end[0]), (False, None))

    def _ends(self, slot: dict) -> list[tuple[str, str]]:
        """The (node, input) within that an input of the subgraph leads to."""
        wanted = slot.get("linkIds")
        return [
            (id, one["name"])
            for id, node in self.nodes.items()
            for one in _dicts(node.get("inputs"))
            if isinstance(wanted, list) and isinstance(one.get("name"), str) and one.get("link") in wanted
        ]

    def _give(self, node: str, widget: str, slots: list[dict], place: Place | None) -> None:
        if place is None:
            return
        if node == "-1":
            self.typed[widget] = place
            return
        while ":" in widget and (node, widget) not in self.inner and not self._has_input(node, widget):
            # "7: text", of an editor that named a widget by the node within the node within.
            widget = widget.partition(":")[2].strip()
        for slot in slots:
            if (node, widget) in self._targets(slot):
                self.typed[slot["name"]] = place
                return
        self.inner[node, widget] = place

    def _has_input(self, node: str, name: str) -> bool:
        return any(one.get("name") == name for one in _dicts(self.nodes.get(node, {}).get("inputs")))

    def _targets(self, slot: dict) -> list[tuple[str, str]]:
        """The (node, widget) within that an input of the subgraph leads to."""
        wanted = slot.get("linkIds")
        return [
            (id, one["widget"].get("name"))
            for id, node in self.nodes.items()
            for one in _dicts(node.get("inputs"))
            if isinstance(wanted, list) and isinstance(one.get("widget"), dict) and one.get("link") in wanted
        ]


def _widget(
    node: dict, name: str, definitions: dict[str, dict], widgets: Widgets, deep: int = 0
) -> tuple[bool, Place | None]:
    """Whether an input of a node is a widget, and where its value is; one of a subgraph is one if it leads to one."""
    if node["type"] not in definitions:
        known = widgets(node)
        if known is not None:
            return name in known, known.get(name)
        return any(one.get("name") == name and bool(one.get("widget")) for one in _dicts(node.get("inputs"))), None
    if deep >= DEEPEST:
        return False, None
    slots = [one for one in _dicts(definitions[node["type"]].get("inputs")) if isinstance(one.get("name"), str)]
    inside = [(one["name"], _end(one, node["type"], definitions, widgets, deep)) for one in slots]
    places = [(each, found) for each, found in inside if found[0]]
    values = node.get("widgets_values")
    for at, (each, found) in enumerate(places):
        if each == name:
            return True, (_place(values, at) if isinstance(values, list) else None) or found[1]
    return False, None


def _end(
    slot: dict, kind: str, definitions: dict[str, dict], widgets: Widgets, deep: int
) -> tuple[bool, Place | None]:
    wanted = slot.get("linkIds")
    for inner in _dicts(definitions[kind].get("nodes")):
        for one in _dicts(inner.get("inputs")):
            linked = isinstance(wanted, list) and one.get("link") in wanted and isinstance(one.get("name"), str)
            if linked and isinstance(inner.get("type"), str):
                found = _widget(inner, one["name"], definitions, widgets, deep + 1)
                if found[0]:
                    return found
    return False, None


def _dicts(listed: Any) -> list[dict]:
    return [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []


def _place(values: list, at: int) -> Place | None:
    return Place(values, at) if at < len(values) and values[at] is not None else None


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
