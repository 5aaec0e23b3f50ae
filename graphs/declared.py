"""Schemas of node classes that ComfyUI knows, built from what it tells its page of them (`/object_info`).

So the reader and the checks, which were written for schemas, work with any class: V1's INPUT_TYPES, V3's dynamic
combos and growing inputs, and classes of other packs. ComfyUI itself is not imported here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from .api import io
from .api.inputs import (
    AutogrowInput,
    BooleanInput,
    ComboInput,
    DynamicComboInput,
    DynamicComboOption,
    FloatInput,
    Input,
    IntInput,
    StringInput,
    TemplateNames,
    TemplatePrefix,
    UploadType,
    WidgetInput,
)
from .api.schema import ComfyNode, Schema
from .graph import Node
from .registry import Registry
from .widgets import PageInput

# What ComfyUI declares of a class.
Info = Mapping[str, Any]
COMBO, DYNAMIC_COMBO, AUTOGROW = "COMBO", "COMFY_DYNAMICCOMBO_V3", "COMFY_AUTOGROW_V3"
_PLAIN: dict[str, tuple[type[WidgetInput], Any]] = {
    "INT": (IntInput, 0), "FLOAT": (FloatInput, 0), "STRING": (StringInput, ""), "BOOLEAN": (BooleanInput, False),
}  # fmt: skip


# Further kinds of inputs for which ComfyUI's page has a widget: its value where a workflow holds none, whether a
# workflow holds it at all, and how many widgets beside it have values of their own there.
WIDGETS: dict[str, tuple[Any, bool, int]] = {
    "BOUNDING_BOX": ({"x": 0, "y": 0, "width": 512, "height": 512}, True, 4),
    "BOUNDING_BOXES": ([], True, 0),
    "CHART": ({}, True, 0),
    "COLOR": ("#000000", True, 0),
    "COLORS": ([], True, 0),
    "COMPOSITOR": (None, True, 0),
    "CURVE": ({"points": [[0, 0], [1, 1]], "interpolation": "monotone_cubic"}, True, 0),
    "GALLERIA": ([], True, 0),
    "IMAGECOMPARE": (["", ""], False, 0),
    "MARKDOWN": ("", True, 0),
    "LOAD_3D": ("", True, 0),
    "PAINTER": ("", True, 0),
    "PREVIEW_3D": ("", True, 0),
    "TEXTAREA": ("", True, 0),
}
# What the page adds to the required inputs of some classes: before which input (None: behind all), and what.
_BUTTONS = {"upload 3d model": "upload3dmodel", "upload extra resources": "uploadExtraResources", "clear": "clear"}
ADDED: dict[str, tuple[str | None, dict[str, Any]]] = {
    "Load3D": ("image", {name: ("STRING", {"default": value}) for name, value in _BUTTONS.items()}),
    "Preview3D": (None, {"image": ("PREVIEW_3D", {})}),
    "SaveGLB": (None, {"image": ("PREVIEW_3D", {})}),
}


class Declared(Registry):
    """Schemas that are made when they are first asked for. host: who knows these classes, for messages."""

    strict = False

    def __init__(self, ids: Iterable[str], info: Callable[[str], Info], host: str):
        super().__init__([])
        self._ids, self._info = dict.fromkeys(ids), info
        self.unknown = (f"is not known to {host}", "Install the pack of nodes that brings it")

    def __iter__(self) -> Iterator[Schema]:
        return (self._made(id) for id in self._ids)

    def find(self, class_type: str) -> Schema | None:
        """The schema of a class, or None."""
        return self._made(class_type) if class_type in self._ids else None

    def names(self) -> list[str]:
        """The ids of all classes."""
        return list(self._ids)

    def cls(self, node: Node) -> type[ComfyNode]:
        """A class without checks of its own: those of a declared class are in the program that has it."""
        return ComfyNode

    def _made(self, id: str) -> Schema:
        if id not in self._schemas:
            self._schemas[id] = schema_of(id, self._info(id))
        return self._schemas[id]


def schema_of(id: str, info: Info) -> Schema:
    """The schema of a class from its entry in `/object_info`."""
    kinds, lists, names = info["output"], info["output_is_list"], info["output_name"]
    outputs = [
        io.Custom(_kind(kind)).Output(id=f"_{i}", display_name=str(names[i]), is_output_list=bool(lists[i]))
        for i, kind in enumerate(kinds)
    ]
    return Schema(
        id,
        display_name=info.get("display_name") or id,
        category=info.get("category") or "",
        inputs=list(_inputs(_with_added(id, info["input"]))),
        outputs=outputs,
        is_input_list=bool(info.get("is_input_list")),
        is_output_node=bool(info.get("output_node")),
    )


def _with_added(id: str, declared: Mapping[str, Any]) -> Mapping[str, Any]:
    if id not in ADDED:
        return declared
    before, added = ADDED[id]
    required: dict[str, Any] = {}
    for name, entry in (declared.get("required") or {}).items():
        required |= added if name == before else {}
        required[name] = entry
    return {**declared, "required": required | added}


def _kind(declared: Any) -> str:
    # A list of choices is a type of its own in V1.
    return COMBO if isinstance(declared, list | tuple) else str(declared)


def _inputs(declared: Mapping[str, Any]) -> Iterator[Input]:
    """Inputs of an INPUT_TYPES: {"required": {name: (type, options)}, "optional": ...}."""
    for group in ("required", "optional"):
        for name, entry in (declared.get(group) or {}).items():
            one = _input(name, entry)
            one.optional = group == "optional"
            yield one


def _input(name: str, entry: Any) -> Input:
    kind, options = _parts(entry)
    wanted = options.get("widgetType") or _kind(kind)
    if options.get("forceInput") or (options.get("rawLink") and wanted not in _PLAIN):
        return io.Custom(_kind(kind)).Input(name)
    if wanted == COMBO:
        return _combo(name, kind, options)
    if wanted == DYNAMIC_COMBO:
        choices = [DynamicComboOption(one["key"], list(_inputs(one["inputs"]))) for one in options["options"]]
        return DynamicComboInput(name, choices)
    if wanted == AUTOGROW:
        return _growing(name, options["template"])
    if wanted in _PLAIN:
        return _plain(name, wanted, options)
    if wanted in WIDGETS:
        default, stored, beside = WIDGETS[wanted]
        return PageInput(name, wanted, copy.deepcopy(options.get("default", default)), stored, beside)
    return io.Custom(_kind(kind)).Input(name)


def _parts(entry: Any) -> tuple[Any, Mapping[str, Any]]:
    # Packs write ("IMAGE",), ("INT", {...}), and now and then a bare type.
    if not isinstance(entry, list | tuple) or not entry:
        return entry, {}
    options = entry[1] if len(entry) > 1 and isinstance(entry[1], Mapping) else {}
    return entry[0], options


def _combo(name: str, kind: Any, options: Mapping[str, Any]) -> ComboInput:
    listed = kind if isinstance(kind, list | tuple) else options.get("options") or []
    default = options.get("default")
    return ComboInput(
        name,
        list(listed),
        default=default if default is not None else (listed[0] if len(listed) else None),
        control_after_generate=options.get("control_after_generate"),
        upload=next((upload for upload in UploadType if options.get(upload.value)), None),
        remote=options.get("remote"),
    )


def _plain(name: str, kind: str, options: Mapping[str, Any]) -> WidgetInput:
    made, empty = _PLAIN[kind]
    more: dict[str, Any] = {}
    if kind in ("INT", "FLOAT"):
        more = {end: options.get(end) for end in ("min", "max", "step")}
    if kind == "INT":
        more["control_after_generate"] = options.get("control_after_generate")
    if kind == "STRING":
        more = {"multiline": bool(options.get("multiline")), "dynamic_prompts": options.get("dynamicPrompts")}
    default = options.get("default")
    return made(name, default=empty if default is None else default, **more)


def _growing(name: str, template: Mapping[str, Any]) -> AutogrowInput:
    (repeated,) = _inputs(template["input"])
    least = int(template.get("min", 0))
    if "names" in template:
        return AutogrowInput(name, TemplateNames(repeated, list(template["names"]), least))
    return AutogrowInput(name, TemplatePrefix(repeated, template["prefix"], least, int(template["max"])))
