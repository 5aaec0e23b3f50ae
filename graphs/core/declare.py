"""How core's nodes are declared here: a function that computes, and the facts of its schema above it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..api import io


def core_node(node_id: str = "", **facts: Any) -> Callable[[Callable[..., io.NodeOutput]], type[io.ComfyNode]]:
    """A node that computes by a function, is called like it and described by its docstring; facts: else of its Schema.

    node_id: where it is another name than the function's.
    """

    def made(function: Callable[..., io.NodeOutput]) -> type[io.ComfyNode]:
        name, said = function.__name__, function.__doc__ or ""

        def define_schema(cls: type) -> io.Schema:
            return io.Schema(node_id=node_id or name, description=said, **facts)

        members = {
            "__doc__": said, "__module__": function.__module__,
            "define_schema": classmethod(define_schema), "execute": staticmethod(function),
        }  # fmt: skip
        return type(name, (io.ComfyNode,), members)

    return made
