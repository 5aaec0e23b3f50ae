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
    UploadType,
    WidgetInput,
)
from .api.schema import Schema
from .dynamic import choice_input, in_order
from .graph import Node, Place

_CONTROLS = {c.value for c in ControlAfterGenerate}
# Choices of files that get a button to upload one.
BUTTONS = (UploadType.image, UploadType.video)
# The class whose choices stand in the workflow.
MADE_UP = "CustomCombo"


class PageInput(WidgetInput):
    """A widget of a kind that only the page knows, whose value is handed on.

    stored: whether a workflow holds its value. beside: how many values of widgets beside it follow.
    """

    def __init__(self, id: str, kind: str, default: Any = None, stored: bool = True, beside: int = 0):
        super().__init__(id, widget_type=kind, default=default)
        self.stored, self.beside = stored, beside


def assign(
    node: Node, schema: Schema, raw: dict[str, Any], notes: list[str], strict: bool = True
) -> list[tuple[str, Any, Place]]:
    """(input name, value, where it is stored) of every widget of a node, `raw` in the file.

    Its "widgets_values" are a list in the order of the widgets or a dict by name. A list that ends early was saved by
    an older version of the node; the later inputs' defaults are added to it, which is said in `notes`. One that does
    not fit otherwise raises NodeError; where not `strict`, it is read as ComfyUI's page reads it: by position, come
    what may, and what is left over is let go. Where a file names its widgets too, a node of another version
    gets what is its own.
    """
    values = raw.get("widgets_values")
    if not strict:
        named = Place.named(values, raw.get("widgets_values_named")) or _listed(raw, values)
        if named and schema.node_id != MADE_UP:
            return _NamedRow(named).take(schema.inputs, "")
        if values is None:
            values = raw["widgets_values"] = []
    if values is None:
        return []
    if isinstance(values, dict):
        return [(name, value, Place(values, name)) for name, value in values.items() if isinstance(name, str)]
    if not isinstance(values, list):
        raise NodeError(
            node, '"widgets_values" must be a list', value=values, remedy="Save the workflow again from ComfyUI"
        )
    row, saved = (_Row if strict else _PageRow)(values), bool(values)
    found = row.take(schema.inputs, "")
    if not strict and schema.node_id == MADE_UP:
        found += _options(values)
    if row.missing and saved:
        notes.append(
            f'node {node.id} "{node.title}": saved before {", ".join(row.missing)} existed; the default is used'
        )
    if strict and row.at < len(values):
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


class _PageRow(_Row):
    """The same, as the page fills its widgets: each takes what stands at its place."""

    def take(self, inputs: Iterable[Input], prefix: str) -> list[tuple[str, Any, Place]]:
        listed = in_order(inputs)
        required = [one for one in listed if not one.optional]
        found = super().take(required, prefix)
        if not prefix and any(isinstance(one, ComboInput) and one.upload in BUTTONS for one in required):
            self.at += 1  # the button stands behind all that is required
        return found + super().take(listed[len(required) :], prefix)

    def one(self, name: str, widget: WidgetInput) -> list[tuple[str, Any, Place]]:
        if isinstance(widget, PageInput) and not widget.stored:
            return [(name, widget.default, Place([widget.default], 0))]
        # Widgets beside it, whose values the prompt does not want.
        beside = widget.beside if isinstance(widget, PageInput) else 0
        if isinstance(widget, IntInput | ComboInput):
            controlled = widget.control_after_generate
            if controlled is None:
                controlled = isinstance(widget, IntInput) and name in ("seed", "noise_seed")
            # A choice's control has a filter beside it.
            beside = bool(controlled) * (1 if isinstance(widget, IntInput) else 2)
        if self.at >= len(self.values):
            if widget.default is None:
                self.at += 1 + beside
                return []
            self.missing.append(name)
            self.values += [None] * (self.at - len(self.values))
            self.values.append(widget.default)
        place = Place(self.values, self.at)
        self.at += 1 + beside
        return [(name, place.holder[place.key], place)]


class _NamedRow(_Row):
    """Values by name; those of widgets that the file does not know are the defaults."""

    def __init__(self, named: dict[str, Place]):
        super().__init__([])
        self.named = named

    def one(self, name: str, widget: WidgetInput) -> list[tuple[str, Any, Place]]:
        if name not in self.named and widget.default is None:
            return []
        place = self.named.get(name) or Place([widget.default], 0)
        return [(name, place.holder[place.key], place)]


def _listed(raw: dict[str, Any], values: Any) -> dict[str, Place]:
    """Values by name where a node's inputs name just as many widgets as there are values, else nothing."""
    inputs = [one for one in raw.get("inputs") or [] if isinstance(one, dict) and isinstance(one.get("widget"), dict)]
    names = [str(one["widget"].get("name")) for one in inputs]
    if not isinstance(values, list) or len(names) != len(values) or len(set(names)) != len(names):
        return {}
    return {name: Place(values, at) for at, name in enumerate(names)}


def places(raw: dict[str, Any], schema: Schema) -> dict[str, Place]:
    """The widgets that a node has in ComfyUI's page, as its values stand, and where these are."""
    return {name: place for name, _, place in assign(Node("", raw["type"], ""), schema, raw, [], False)}


def _options(values: list) -> list[tuple[str, Any, Place]]:
    """What the page adds to a choice that users make up: the number of what is chosen, and all that can be."""
    names = ["index", *(f"option{number}" for number in range(1, len(values) - 1))]
    return [(name, values[at], Place(values, at)) for at, name in enumerate(names, 1) if at < len(values)]
