"""The UI format: litegraph's nodes, links and widget values by position, in its versions 0.4 and 1.0.

Read as ComfyUI's editor queues it: muted nodes (mode 2) fall away, bypassed ones (mode 4) hand an input of the
output's type through, reroutes are followed, primitive nodes become constants, notes are left out, and subgraphs
are unfolded. So are the packs' nodes that exist on the page alone and stand for a wire: reroutes, and those that set a
value under a name and get it elsewhere. `editor` has what happens to the texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..files.errors import NodeError
from . import editor, subgraphs
from .graph import Graph, Link, Node, Place
from .registry import Registry
from .subgraphs import AGAIN, BYPASSED, MUTED
from .widgets import MADE_UP, assign, places

REROUTES = ("Reroute", "Reroute (rgthree)")
# What gets a value by its name, and what sets it (KJNodes, Easy-Use).
NAMED = {"GetNode": "SetNode", "easy getNode": "easy setNode"}
# What exists on ComfyUI's page alone: these run nowhere.
VIRTUAL = ("Note", "MarkdownNote", "PrimitiveNode", *REROUTES, *NAMED, *NAMED.values())


def read(document: dict[str, Any], registry: Registry, seed: int | None = None) -> Graph:
    """The graph of a UI-format document. seed: see `editor.finish`.

    Raises UsageError, NodeError where a node is at fault.
    """
    def widgets(raw: dict[str, Any]) -> Mapping[str, Place] | None:
        schema = registry.find(raw["type"])
        return None if schema is None else places(raw, schema)

    flat = subgraphs.unfold(document, None if registry.strict else widgets)
    graph = Graph({}, document)
    reader = _Reader(flat, registry)
    for id, raw in flat.nodes.items():
        if raw.get("mode") not in (MUTED, BYPASSED) and raw["type"] not in VIRTUAL:
            graph.nodes[id] = reader.node(raw, graph.notes)
    editor.finish(graph, registry, flat.nodes, seed, frozenset(reader.typed))
    return graph


class _Reader:
    def __init__(self, flat: subgraphs.Flat, registry: Registry):
        self.raws, self.links, self.registry = flat.nodes, flat.links, registry
        self.widgets, self.primitives = flat.widgets, flat.primitives
        # (node, input) whose values are typed on a subgraph.
        self.typed: list[tuple[str, str]] = []

    def title(self, raw: dict) -> str:
        title = raw.get("title")
        if isinstance(title, str) and title:
            return title
        schema = self.registry.find(raw["type"])
        return (schema.display_name if schema is not None else None) or raw["type"]

    def node(self, raw: dict, notes: list[str]) -> Node:
        node = Node(str(raw["id"]), raw["type"], self.title(raw))
        schema = self.registry.find(node.class_type)
        # Of a class that is not known here only the links count, should an output need it.
        known = [] if schema is None else assign(node, schema, raw, notes, self.registry.strict)
        for name, value, place in known:
            node.inputs[name] = value
            node.places[name] = place
        for name, link in self.sockets(node, raw):
            source = self.source(node, name, link)
            if source is None:
                continue
            node.places.pop(name, None)
            if isinstance(source, Place):
                node.inputs[name] = source.holder[source.key]
                node.places[name] = source
            else:
                node.inputs[name] = source
        if node.class_type == MADE_UP and not self.registry.strict:
            options = [value for name, value in node.inputs.items() if name.startswith("option")]
            chosen = node.inputs.get("choice")
            node.inputs["index"] = options.index(chosen) if chosen in options else -1
        return node

    def sockets(self, node: Node, raw: dict) -> list[tuple[str, Any]]:
        """(input name, link id) of the connected inputs."""
        found = []
        inputs = raw.get("inputs") or []
        if not isinstance(inputs, list):
            raise NodeError(node, '"inputs" must be a list', remedy=AGAIN)
        for one in inputs:
            if not isinstance(one, dict) or not isinstance(one.get("name"), str):
                raise NodeError(node, "an input has no name", remedy=AGAIN)
            if one.get("link") is not None:
                found.append((one["name"], one["link"]))
        return found

    def source(self, node: Node, input: str, link: Any) -> Link | Place | None:
        """What a link brings in the end: another node's output, a primitive's value, or nothing."""
        seen = set()
        while link is not None:
            if not isinstance(link, int | str) or link not in self.links:
                raise NodeError(node, "its link is not in the file", input=input, value=link, remedy=AGAIN)
            if link in seen:
                raise NodeError(node, "it hangs on reroutes that form a ring", input=input, remedy="Cut the ring")
            seen.add(link)
            id, slot = self.links[link]
            if id in self.widgets:
                self.typed.append((node.id, input))
                return self.widgets[id]
            raw = self.raws.get(id)
            if raw is None:
                raise NodeError(node, f"it is linked to node {id}, which is not in the file", input=input, remedy=AGAIN)
            if raw.get("mode") == MUTED:
                return None
            if id in self.primitives:
                return self.primitives[id]
            if raw["type"] == "PrimitiveNode":
                if not self.registry.strict and id.rpartition(":")[0] != node.id.rpartition(":")[0]:
                    return None  # the page's primitive nodes reach no further than the graph that they are in
                values = raw.get("widgets_values")
                if not isinstance(values, list) or not values:
                    raise NodeError(node, f"the primitive node {id} holds no value", input=input, remedy=AGAIN)
                return Place(values, 0)
            if raw["type"] in (*REROUTES, *NAMED.values()):
                link = self.input_link(raw, 0)
            elif raw["type"] in NAMED:
                link = self.input_link(self.setter(node, input, raw), 0)
            elif raw.get("mode") == BYPASSED:
                link = self.bypass(raw, slot)
            else:
                return Link(id, slot)
        return None

    def setter(self, node: Node, input: str, raw: dict) -> dict:
        """The node that sets what `raw` gets: of its own graph before others."""
        name = self.name_of(raw)
        found = [one for one in self.raws.values() if one["type"] == NAMED[raw["type"]] and self.name_of(one) == name]
        graph = str(raw["id"]).rpartition(":")[0]
        found.sort(key=lambda one: str(one["id"]).rpartition(":")[0] != graph)
        if not found:
            said = f"node {raw['id']} ({raw['type']}) gets {name!r:.60}, which no node sets"
            raise NodeError(node, said, input=input, remedy=AGAIN)
        return found[0]

    @staticmethod
    def name_of(raw: dict) -> Any:
        values = raw.get("widgets_values")
        return values[0] if isinstance(values, list) and values else None

    def input_link(self, raw: dict, slot: int) -> Any:
        inputs = raw.get("inputs")
        if not isinstance(inputs, list) or not 0 <= slot < len(inputs) or not isinstance(inputs[slot], dict):
            return None
        return inputs[slot].get("link")

    def bypass(self, raw: dict, slot: int) -> Any:
        """The link that a bypassed node hands through: the input of the output's number, else the first of its type."""
        listed = raw.get("inputs")
        inputs = [i for i in listed if isinstance(i, dict)] if isinstance(listed, list) else []
        outputs = raw.get("outputs")
        if not isinstance(outputs, list) or not 0 <= slot < len(outputs) or not isinstance(outputs[slot], dict):
            return None
        kind = outputs[slot].get("type")
        if kind == "*" and inputs:
            return inputs[slot if slot < len(inputs) else 0].get("link")
        same = [i for i in inputs if i.get("type") == kind]
        if 0 <= slot < len(inputs) and inputs[slot].get("type") in (kind, "*"):
            same.insert(0, inputs[slot])
        same += [i for i in inputs if i.get("type") == "*"]
        return same[0].get("link") if same else None
