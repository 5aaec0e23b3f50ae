"""Which inputs a node has right now: dynamic ones unfold by the values given, and fold again for `execute`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .api.inputs import AutogrowInput, ComboInput, DynamicComboInput, Input
from .api.schema import Schema


@dataclass(frozen=True)
class Live:
    """An input with the dotted name that workflows use for it. `choice`: it decides which others exist."""

    name: str
    input: Input
    required: bool
    choice: bool = False


def in_order(inputs: Iterable[Input]) -> list[Input]:
    """Required inputs first, then optional ones: the order of sockets and widgets in ComfyUI."""
    return sorted(inputs, key=lambda i: i.optional)


def live_inputs(schema: Schema, values: dict[str, Any]) -> list[Live]:
    """The schema's inputs, dynamic ones unfolded by `values` (dotted name -> value)."""
    return list(_unfold(schema.inputs, values, ""))


def choice_input(combo: DynamicComboInput, name: str) -> ComboInput:
    """The plain combo that a dynamic combo's own value is checked against."""
    options = [option.key for option in combo.options]
    choice = ComboInput(name, options, default=options[0] if options else None, tooltip=combo.tooltip)
    choice.optional = combo.optional
    return choice


def _unfold(inputs: Iterable[Input], values: dict[str, Any], prefix: str) -> Iterator[Live]:
    for one in in_order(inputs):
        name = prefix + one.id
        if isinstance(one, DynamicComboInput):
            choice = choice_input(one, name)
            yield Live(name, choice, not one.optional, choice=True)
            chosen = values.get(name, choice.default)
            for option in one.options:
                if option.key == chosen:
                    yield from _unfold(option.inputs, values, f"{name}.")
        elif isinstance(one, AutogrowInput):
            for i, copy in enumerate(one.template.get_all()):
                yield Live(f"{name}.{copy.id}", copy, i < one.template.min and not copy.optional)
        else:
            yield Live(name, one, not one.optional)


def fold(schema: Schema, values: dict[str, Any]) -> dict[str, Any]:
    """Dotted values as `execute` receives them, such as {"method": {"method": "distill", "steps": 4}}."""
    choices = {name for name, one in _dynamic(schema.inputs, values, "") if isinstance(one, DynamicComboInput)}
    folded: dict[str, Any] = {}
    for name, one in _dynamic(schema.inputs, values, ""):
        if isinstance(one, AutogrowInput):
            _put(folded, name.split("."), {})
    for name, value in values.items():
        parts = name.split(".")
        _put(folded, [*parts, parts[-1]] if name in choices else parts, value)
    return folded


def _dynamic(inputs: Iterable[Input], values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Input]]:
    for one in inputs:
        name = prefix + one.id
        if isinstance(one, DynamicComboInput | AutogrowInput):
            yield name, one
        if isinstance(one, DynamicComboInput):
            for option in one.options:
                if option.key == values.get(name):
                    yield from _dynamic(option.inputs, values, f"{name}.")


def _put(folded: dict[str, Any], parts: list[str], value: Any) -> None:
    for part in parts[:-1]:
        folded = folded.setdefault(part, {})
    folded[parts[-1]] = value
