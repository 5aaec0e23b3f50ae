"""The nodes that a run may use: core nodes of the headless host and the plugin's own."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from ..files.errors import NodeError, short
from .api.schema import ComfyExtension, ComfyNode, Schema
from .graph import Node

# How group nodes were called, which came before subgraphs.
GROUP_NODES = ("workflow>", "workflow/")
AGAIN = "Open the workflow in ComfyUI, which makes a subgraph of it, and save it again"


class Registry:
    """Node classes by id, each with its schema as of now (file lists included)."""

    # Whether a node whose stored values do not fit its widgets is refused.
    strict = True
    # What is said of a class that is not there, and what to do about it.
    unknown = ("is not known to the headless host", "`retort nodes` lists those that are; other nodes need ComfyUI")

    def __init__(self, classes: Iterable[type[ComfyNode]]):
        self._classes: dict[str, type[ComfyNode]] = {}
        self._schemas: dict[str, Schema] = {}
        for cls in classes:
            schema = cls.GET_SCHEMA()
            self._classes[schema.node_id] = cls
            self._schemas[schema.node_id] = schema

    def __iter__(self):
        return iter(self._schemas.values())

    def find(self, class_type: str) -> Schema | None:
        """The schema of a class, or None."""
        return self._schemas.get(class_type)

    def schema(self, node: Node) -> Schema:
        """The schema of a node; NodeError for an unknown class, with the nearest known ones."""
        schema = self.find(node.class_type)
        if schema is None:
            near = difflib.get_close_matches(node.class_type, self.names(), n=2)
            hint = f"Did you mean {' or '.join(near)}? " if near else ""
            said, remedy = self.unknown
            if node.class_type.startswith(GROUP_NODES):
                said, remedy = "is a group node, which ComfyUI's page takes apart when it opens the file", AGAIN
            raise NodeError(node, f"the class {short(repr(node.class_type))} {said}", remedy=f"{hint}{remedy}")
        return schema

    def names(self) -> list[str]:
        """The ids of all classes."""
        return list(self._schemas)

    def cls(self, node: Node) -> type[ComfyNode]:
        """The class of a node that `schema` knows."""
        return self._classes[node.class_type]


async def plugin_nodes() -> list[type[ComfyNode]]:
    """The plugin's nodes, asked for as ComfyUI does it."""
    from .. import comfy_entrypoint

    extension: ComfyExtension = await comfy_entrypoint()
    await extension.on_load()
    return await extension.get_node_list()


async def everything() -> Registry:
    """Core nodes and the plugin's."""
    from .core import NODES

    return Registry([*NODES, *await plugin_nodes()])
