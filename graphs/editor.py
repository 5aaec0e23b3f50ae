"""What ComfyUI's editor does with a saved workflow when it queues it, beyond reading its nodes and links.

* Prompt boxes lose their comments (`//` to the end of the line, `/* */`), and one of the choices in braces is taken.
  What is typed on a subgraph stays as it is.
* In the file name prefix of nodes that save, `%date:yyyy-MM-dd%` becomes the date and `%node.widget%` that widget's
  value. (`%width%`, `%year%` and their like are left to the node that saves.)

A prompt in API format has been through this already and stays as it is.
"""

from __future__ import annotations

import random
import re
import time
from typing import Any

from .api.inputs import StringInput
from .dynamic import live_inputs
from .graph import Graph, Link, Node
from .registry import Registry

_COMMENTS = re.compile(r"/\*[\s\S]*?\*/|//.*")
_ESCAPED = re.compile(r"\\([{}|])")
_REPLACED = re.compile(r"%([^%]+)%")
_DATE = re.compile("dd?|MM?|hh?|mm?|ss?|yyyy|yy")
_NOT_IN_NAMES = re.compile(r'[/?<>\\:*|"\x00-\x1f\x7f]')


def finish(
    graph: Graph, registry: Registry, raws: dict[str, dict], seed: int | None = None,
    typed: frozenset[tuple[str, str]] = frozenset(),
) -> None:  # fmt: skip
    """Bring the texts of a graph that was read from the UI format into the form in which the editor queues them.

    raws: the nodes as the file has them, by id, for the names that `%node.widget%` may use. seed: of the random
    choices; None takes the first seed of the graph, so that the same file draws the same choices. typed: (node, input)
    whose values are typed on a subgraph.
    """
    if seed is None:
        seeds = (n.inputs.get(name) for n in graph.nodes.values() for name in ("seed", "noise_seed"))
        seed = next((value for value in seeds if isinstance(value, int)), 0)
    for node in graph.nodes.values():
        schema = registry.find(node.class_type)
        if schema is None:
            continue
        for live in live_inputs(schema, node.inputs):
            name, value = live.name, node.inputs.get(live.name)
            if not isinstance(value, str):
                continue
            if (node.id, name) in typed:
                continue
            if isinstance(live.input, StringInput) and live.input.dynamic_prompts:
                node.inputs[name] = dynamic_prompt(value, random.Random(f"{seed} {node.id} {name}"))
            elif name == "filename_prefix" and schema.is_output_node:
                node.inputs[name] = _replaced(value, graph, raws)


def dynamic_prompt(text: str, draws: random.Random) -> str:
    """A prompt without comments, with one of each `{a|b}` chosen; a backslash keeps a brace or bar as it is."""
    return _ESCAPED.sub(r"\1", _chosen(_COMMENTS.sub("", text), draws))


def _chosen(text: str, draws: random.Random) -> str:
    out, at = [], 0
    while at < len(text):
        if text[at] == "\\":
            out.append(text[at : at + 2])
            at += 2
        elif text[at] == "{":
            options, at = _options(text, at + 1)
            out.append(dynamic_prompt(draws.choice(options), draws))
        else:
            out.append(text[at])
            at += 1
    return "".join(out)


def _options(text: str, at: int) -> tuple[list[str], int]:
    """The alternatives behind an opening brace, and where its closing brace ends (or the text does)."""
    options: list[str] = []
    begin, depth = at, 0
    while at < len(text):
        char = text[at]
        if char == "\\":
            at += 2
            continue
        if char == "{":
            depth += 1
        elif char == "}":
            if not depth:
                return [*options, text[begin:at]], at + 1
            depth -= 1
        elif char == "|" and not depth:
            options.append(text[begin:at])
            begin = at + 1
        at += 1
    return [*options, text[begin:]], len(text)


def _replaced(prefix: str, graph: Graph, raws: dict[str, dict]) -> str:
    def value(found: re.Match) -> str:
        node, dot, name = found[1].partition(".")
        if not dot:
            return _date(node[5:]) if node.startswith("date:") else found[0]
        for candidate in _named(node, graph, raws):
            given: Any = candidate.inputs.get(name)
            if given is not None and not isinstance(given, Link):
                return _NOT_IN_NAMES.sub("_", _as_text(given))
        return found[0]

    return _REPLACED.sub(value, prefix)


def _named(name: str, graph: Graph, raws: dict[str, dict]) -> list[Node]:
    """The node that a replacement means: by the name that its properties hold, else by title; the first one counts."""
    by_property = [
        node
        for id, node in graph.nodes.items()
        if isinstance(properties := raws.get(id, {}).get("properties"), dict)
        and properties.get("Node name for S&R") == name
    ]
    return (by_property or [node for node in graph.nodes.values() if node.title == name])[:1]


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _date(pattern: str) -> str:
    now = time.localtime()
    parts = {"d": now.tm_mday, "M": now.tm_mon, "h": now.tm_hour, "m": now.tm_min, "s": now.tm_sec}

    def part(found: re.Match) -> str:
        if found[0][0] == "y":
            return f"{now.tm_year}"[-len(found[0]) :]
        return f"{parts[found[0][0]]}".zfill(len(found[0]))

    return _DATE.sub(part, pattern)
