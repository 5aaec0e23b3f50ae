"""Widget values by position: which stored value belongs to which input of a node."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..files.errors import NodeError
from .api.inputs import (
    ComboInput,
    ControlAfterGenerate,
    DynamicComboInput,
    Input,
    IntInput,
    WidgetInput,
)
from .api.schema import Schema
from .dynamic import choice_input, in_order
from .graph import Node, Place

_CONTROLS = {c.value for c in ControlAfterGenerate}


def assign(node: Node, schema: Schema, values: Any, notes: list[str]) -> list[tuple[str, Any, Place]]:
    """(input name, value, where it is stored) of every widget.

    values: the node's "widgets_values", a list in the order of the widgets or a dict by name. A list that ends early
    was saved by an older version of the node; the later inputs' defaults are added to it, which is said in `notes`. One
    that does not fit otherwise raises NodeError.
    """
    if values is None:
        return []
    if isinstance(values, dict):
        return [(name, value, Place(values, name)) for name, value in values.items() if isinstance(name, str)]
    if not isinstance(values, list):
        raise NodeError(
            node, '"widgets_values" must be a list', value=values, remedy="Save the workflow again from ComfyUI"
        )
    row, saved = _Row(values), bool(values)
    found = row.take(schema.inputs, "")
    if row.missing and saved:
        notes.append(
            f'node {node.id} "{node.title}": saved before {", ".join(row.missing)} existed; the default is used'
        )
    if row.at < len(values):
        raise NodeError(
            node,
            f"{len(values) - row.at} of its {len(values)} widget values belong to no input",
            value=values[row.at :],
            remedy="The node was saved by another version: open the workflow in ComfyUI, check it and save it again",
        )
    return found


class _Row:
    """A list of widget values, taken from the front."""

    def __init__(self, values: list):
        self.values, self.at = values, 0
        self.missing: list[str] = []
        self.whole = True  # so far

    def next_is(self, wanted: Iterable[str]) -> bool:
        return self.at < len(self.values) and isinstance(self.values[self.at], str) and self.values[self.at] in wanted

    def take(self, inputs: Iterable[Input], prefix: str) -> list[tuple[str, Any, Place]]:
        found = []
        for one in in_order(inputs):
            name = prefix + one.id
            if isinstance(one, DynamicComboInput):
                found += self.one(name, choice_input(one, name))
                chosen = found[-1][1] if found and found[-1][0] == name else None
                for option in one.options:
                    if option.key == chosen:
                        found += self.take(option.inputs, f"{name}.")
                continue
            if isinstance(one, WidgetInput) and not one.force_input:
                found += self.one(name, one)
        return found

    def one(self, name: str, widget: WidgetInput) -> list[tuple[str, Any, Place]]:
        # The editor stores what happens to a seed after the run, and an upload button's label, behind the value.
        controlled = isinstance(widget, IntInput | ComboInput) and bool(widget.control_after_generate)
        controlled |= name in ("seed", "noise_seed")
        label = widget.upload.value.partition("_")[0] if isinstance(widget, ComboInput) and widget.upload else None
        if self.at >= len(self.values):
            self.missing.append(name)
            # As the editor does when it opens the file, so that prompt and embedded workflow are whole. Behind a value
            # that is not known, or has more behind it, the places of others are not known either.
            self.whole &= widget.default is not None and not controlled and label is None
            if not self.whole:
                return []
            self.values.append(widget.default)
        place = Place(self.values, self.at)
        self.at += 1
        if controlled and self.next_is(_CONTROLS):
            self.at += 1
        if label is not None and self.next_is((label,)):
            self.at += 1
        return [(name, place.holder[place.key], place)]
