"""Core's constants as nodes, and any value as text."""

from __future__ import annotations

import json
import sys
from typing import Any

from ..api import io, ui
from .declare import core_node


def _primitive(node_id: str, title: str, kind, **options):
    """A node that hands its one widget on."""

    def define_schema(cls):
        return io.Schema(
            node_id=node_id,
            display_name=title,
            category="utils/primitive",
            description="A constant.",
            inputs=[kind.Input("value", **options)],
            outputs=[kind.Output()],
        )

    def execute(cls, value):
        return io.NodeOutput(value)

    body = {"define_schema": classmethod(define_schema), "execute": classmethod(execute)}
    return type(node_id, (io.ComfyNode,), body)


@core_node(
    display_name="Preview as Text",
    category="utilities",
    inputs=[io.AnyType.Input("source")],
    outputs=[io.String.Output()],
    is_output_node=True,
)
def PreviewAny(source: Any):
    """The value as text: a string as it is, what JSON can hold as JSON."""
    text = _as_text(source)
    return io.NodeOutput(text, ui=ui.PreviewText(text))


def _as_text(value: Any) -> str:
    if isinstance(value, str | bool | int | float) or value is None:
        return str(value)
    try:
        return json.dumps(value, indent=4, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)


_WIDE = sys.maxsize
NODES = [
    PreviewAny,
    _primitive("PrimitiveInt", "Int", io.Int, default=0, min=-_WIDE, max=_WIDE, control_after_generate=True),
    _primitive("PrimitiveFloat", "Float", io.Float, default=0.0, min=-_WIDE, max=_WIDE, step=0.1),
    _primitive("PrimitiveString", "String", io.String, default=""),
    _primitive("PrimitiveStringMultiline", "String (Multiline)", io.String, default="", multiline=True),
    _primitive("PrimitiveBoolean", "Boolean", io.Boolean, default=False),
]
