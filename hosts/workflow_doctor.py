"""What a workflow lacks here before it can run: classes of nodes, and files with the folder that each belongs into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..files.errors import UsageError
from ..graphs import validate, workflow
from ..graphs.api.inputs import ComboInput
from ..graphs.dynamic import live_inputs
from ..graphs.file_inputs import FileInput
from ..graphs.graph import Graph, Link, Node
from ..graphs.registry import Registry
from .headless.doctor import Finding

# Endings of the files that nodes choose among.
MODELS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx", ".yaml")
MEDIA = (
    ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".mp4", ".webm", ".mov", ".mkv", ".mp3", ".wav", ".flac", ".ogg",
    ".m4a", ".glb", ".gltf", ".obj", ".stl", ".fbx", ".ply",
)  # fmt: skip


def examine(source: Path, known: Registry, host: str, folder_of: Callable[[list[Any]], str]) -> list[Finding]:
    """What a workflow file would run on, which is `host` with its nodes `known`, and what is missing for it.

    folder_of: the folder of the files that a choice is among. UsageError for a file that is no workflow.
    """
    graph = workflow.read(source, known)
    needed = _needed(graph, known)
    # A prompt without a UI workflow carries no hints.
    told = _Told(graph.document or {})
    found = [Finding("runs on", True, host)]
    missing: dict[str, list[str]] = {}
    for node in needed:
        if known.find(node.class_type) is None:
            missing.setdefault(node.class_type, []).append(node.id)
    for kind, ids in missing.items():
        pack = told.packs.get(kind)
        remedy = f"install the pack {pack}" if pack else "install the pack of nodes that brings it"
        found.append(Finding("node", False, f"{kind} is not known there (node {', '.join(ids)})", remedy))
    files = {row.detail: row for node in needed for row in _files(node, known, told, folder_of)}
    found += files.values()
    if not missing and not files:
        found.append(Finding("nodes, files", True, f"all {len(needed)} nodes that run are known, no file is missing"))
    return found


def _needed(graph: Graph, known: Registry) -> list[Node]:
    """The nodes that an output needs, as far as they can be told with classes missing; then all."""
    try:
        _, order = validate.needed(graph, known)
    except UsageError:
        return list(graph.nodes.values())
    return [graph.nodes[id] for id in order]


class _Told:
    """What a UI workflow says of packs by class, and of the models of its nodes by name: their folder and address."""

    def __init__(self, document: dict[str, Any]):
        self.packs: dict[str, str] = {}
        self.models: dict[str, dict[str, Any]] = {}
        definitions = document.get("definitions")
        inner = definitions.get("subgraphs") if isinstance(definitions, dict) else None
        for content in [document, *(inner if isinstance(inner, list) else ())]:
            listed = content.get("nodes") if isinstance(content, dict) else None
            for raw in listed if isinstance(listed, list) else ():
                properties = raw.get("properties") if isinstance(raw, dict) else None
                if isinstance(properties, dict):
                    self._add(str(raw.get("type")), properties)

    def _add(self, kind: str, properties: dict[str, Any]) -> None:
        pack = properties.get("aux_id") or properties.get("cnr_id")
        if isinstance(pack, str) and pack != "comfy-core":
            self.packs[kind] = pack
        models = properties.get("models")
        for model in models if isinstance(models, list) else ():
            if isinstance(model, dict) and isinstance(model.get("name"), str):
                self.models[model["name"]] = model


def _files(
    node: Node, known: Registry, told: _Told, folder_of: Callable[[list[Any]], str]
) -> Iterator[Finding]:
    schema = known.find(node.class_type)
    for live in () if schema is None else live_inputs(schema, node.inputs):
        value, one = node.inputs.get(live.name), live.input
        if not isinstance(value, str) or isinstance(value, Link) or not isinstance(one, ComboInput):
            continue
        where = f'node {node.id} "{node.title}", {live.name}'
        if isinstance(one, FileInput):
            try:
                one.check(value)
            except UsageError as problem:
                yield Finding("file", False, f"{value} is missing ({where})", str(problem))
        elif value not in one.options and value.lower().endswith((*MODELS, *MEDIA)):
            model = told.models.get(value.replace("\\", "/").rpartition("/")[2], {})
            folder = model.get("directory") or folder_of(one.options)
            kind = "input" if value.lower().endswith(MEDIA) else folder
            url = f" from {model['url']}" if model.get("url") else ""
            yield Finding("file", False, f"{value} is missing ({where})", f"put it into the folder {kind}{url}")
