"""A node's inputs from the declarations of settings, and the values of those that a prompt left out.

Every input with a default may be left out of a prompt: both hosts take it as it would stand on a new node.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..files.paths import FileNames
from ..hosts.api import io
from ..sampling.settings import Setting, Settings, offered

CHOICE = "COMFY_DYNAMICCOMBO_V3"
SEED_MAX = 0xFFFFFFFFFFFFFFFF
# Hidden inputs of a node that looks at what it is connected to.
PROMPTED = (io.Hidden.prompt, io.Hidden.unique_id)


def schema(**given: Any) -> io.Schema:
    """A node's schema, whose inputs that have a default are optional."""
    optional(given["inputs"])
    return io.Schema(**given)


def optional(inputs: Iterable[Any]) -> None:
    """Let those that have a default be left out, within the options of a choice too."""
    before = False
    for one in inputs:
        if one.get_io_type() == CHOICE:
            # Hosts put optional inputs last, and saved workflows know widgets by their place.
            one.optional = before
            for option in one.options:
                optional(option.inputs)
        elif getattr(one, "default", None) is not None:
            one.optional = before = True


def number(id: str, default: float, low: float, high: float, tooltip: str, **more: Any) -> Any:
    """A number: a whole one where its default is whole. more: further arguments of the input."""
    kind = io.Float if isinstance(default, float) else io.Int
    return kind.Input(id, default=default, min=low, max=high, tooltip=tooltip, **more)


def seed_input(tooltip: str) -> io.Int.Input:
    """A seed, which the page may change after each run."""
    return io.Int.Input("seed", default=0, min=0, max=SEED_MAX, control_after_generate=True, tooltip=tooltip)


def file_input(id: str, names: Iterable[str], tooltip: str, **more: Any) -> Any:
    """One of several files, which a workflow may name with either separator. more: further arguments of the input."""
    return io.Combo.Input(id, options=FileNames(names), tooltip=tooltip, **more)


def inputs_of(config: type[Settings], **changes: Any) -> list[Any]:
    """The inputs of a config's settings, in their order.

    changes: what is different on a node, by the setting's name: another default, or a dictionary of the input's
    arguments.
    """
    return [input_of(one, changes.get(one.name)) for one in offered(config)]


def input_of(one: Setting, change: Any = None) -> Any:
    """The input of a setting; change: see `inputs_of`."""
    facts: dict[str, Any] = {"default": one.default, "tooltip": one.help}
    if one.advanced:
        facts["advanced"] = True
    if one.choices:
        kind, facts["options"] = io.Combo, list(one.choices)
    elif one.kind in (int, float):
        kind = io.Int if one.kind is int else io.Float
        facts |= {"min": one.low, "max": one.high} | ({"step": one.step} if one.step else {})
        if one.kind is float:
            facts = {name: float(v) if name in ("default", "min", "max") else v for name, v in facts.items()}
            facts |= {"step": one.step or 0.01} | ({"round": one.round} if one.round else {})
    else:
        kind = io.Boolean if one.kind is bool else io.String
    if change is not None:
        facts |= change if isinstance(change, dict) else {"default": change}
    return kind.Input(one.name, **facts)


def completed(node: type[io.ComfyNode], given: Mapping[str, Any]) -> dict[str, Any]:
    """The single values that a node was given, with the defaults of those that the prompt left out."""
    found = dict(given)
    for one in node.define_schema().inputs:
        if one.get_io_type() == CHOICE:
            found[one.id] = _chosen(one, found.get(one.id))
        elif found.get(one.id) is None and (default := getattr(one, "default", None)) is not None:
            found[one.id] = default
    return found


def chosen(node: type[io.ComfyNode], id: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    """The value of a choice, {id: option, and the option's inputs}, likewise completed."""
    return _chosen(next(one for one in node.define_schema().inputs if one.id == id), value)


def _chosen(choice: Any, value: Mapping[str, Any] | None) -> dict[str, Any]:
    # ComfyUI drops a choice that it does not know, and gives None for an input of an option that was left out.
    found = {name: each for name, each in (value or {}).items() if each is not None}
    known = {option.key: option.inputs for option in choice.options}
    key = found.get(choice.id)
    if key not in known:
        wrong = "has no value" if key is None else f"is {key!r:.80}, which this version of the node does not know"
        raise ValueError(f"{choice.id} {wrong}: choose one of {', '.join(known)}")
    for one in known[key]:
        if (default := getattr(one, "default", None)) is not None:
            found.setdefault(one.id, default)
    return found
