"""Core's constants as nodes."""

from __future__ import annotations

import sys

from .. import io


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


_WIDE = sys.maxsize
NODES = [
    _primitive("PrimitiveInt", "Int", io.Int, default=0, min=-_WIDE, max=_WIDE, control_after_generate=True),
    _primitive("PrimitiveFloat", "Float", io.Float, default=0.0, min=-_WIDE, max=_WIDE, step=0.1),
    _primitive("PrimitiveString", "String", io.String, default=""),
    _primitive("PrimitiveStringMultiline", "String (Multiline)", io.String, default="", multiline=True),
    _primitive("PrimitiveBoolean", "Boolean", io.Boolean, default=False),
]
