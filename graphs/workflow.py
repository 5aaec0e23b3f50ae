"""Reads a workflow: JSON in UI or API format, or the one that a picture from ComfyUI carries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..files import pictures, texts
from ..files.errors import UsageError
from . import subgraphs, workflow_ui
from .graph import Graph, Link, Node, Place
from .registry import Registry

_PICTURES = (b"\x89PNG\r\n\x1a\n", b"RIFF", b"\xff\xd8\xff")
# What else people give for a workflow, by how it begins.
_OTHERS = {
    b"\x1aE\xdf\xa3": "a WebM or Matroska video", b"GIF8": "a GIF", b"II*\0": "a TIFF", b"MM\0*": "a TIFF",
    b"fLaC": "a sound", b"ID3": "a sound", b"OggS": "a sound", b"glTF": "a 3D model", b"PK\x03\x04": "a ZIP archive",
    b"<": "a page or a drawing (HTML, SVG)",
}  # fmt: skip
_DEPTH = 60


def read(path: Path, registry: Registry, seed: int | None = None) -> Graph:
    """The graph of a workflow file. seed: of random choices in prompts, see `editor.finish`.

    Raises UsageError (NodeError where a node is at fault).
    """
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(path)!r} cannot be read: {error}. Give the path of a workflow file") from error
    if data.startswith(_PICTURES) or data[4:12] == b"ftypavif":
        return _from_picture(path, registry, seed)
    other = "of the kind of MP4 and HEIC" if data[4:8] == b"ftyp" else None
    other = other or next((kind for start, kind in _OTHERS.items() if data.lstrip().startswith(start)), None)
    if other is not None:
        raise UsageError(
            f"{path} is {other}, and workflows are read from JSON and from PNG, WebP, JPEG and AVIF pictures. Drop it "
            "into ComfyUI's window, which opens the workflow that it may carry, and use Workflow > Save"
        )
    return from_document(parse(data, str(path)), registry, seed)


def parse(data: bytes | str, name: str) -> Any:
    """JSON as Python objects. Raises UsageError with line and column."""
    try:
        text = texts.decode(data) if isinstance(data, bytes) else data
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{name} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}. "
            "Save the workflow again from ComfyUI"
        ) from error
    except (ValueError, RecursionError) as error:  # no text, a number of thousands of digits, thousands of brackets
        raise UsageError(f"{name} is not a workflow: {error}. Save it again from ComfyUI") from error
    level, depth = [document], 0
    while level:
        level = [v for c in level if isinstance(c, dict | list) for v in (c.values() if isinstance(c, dict) else c)]
        depth += 1
        if depth > _DEPTH:
            raise UsageError(f"{name} is not a workflow: it is nested more than {_DEPTH} deep")
    return document


def from_document(document: Any, registry: Registry, seed: int | None = None) -> Graph:
    """The graph of a parsed workflow in either format. seed: see `read`."""
    document = _unwrapped(document)
    if isinstance(document, dict):
        if isinstance(document.get("nodes"), list):
            return workflow_ui.read(document, registry, seed)
        if any(isinstance(node, dict) and "class_type" in node for node in document.values()):
            return _from_api(document)
    raise UsageError(
        'this is not a workflow: it has neither a list "nodes" (UI format) nor nodes with a "class_type" (API format). '
        "In ComfyUI use Workflow > Save, or Workflow > Export (API)"
    )


def _unwrapped(document: Any) -> Any:
    """The workflow within what programs put around one.

    A prompt as it is posted to ComfyUI, what its page makes of a graph ({"workflow", "output"}), an entry of its
    history (whose prompt is a list), or JSON within a text of JSON.
    """
    if isinstance(document, str):
        try:
            document = json.loads(document)
        except ValueError:
            return document
    if not isinstance(document, dict) or "nodes" in document or "class_type" in document:
        return document
    if len(document) == 1 and isinstance(only := next(iter(document.values())), dict) and "class_type" not in only:
        document = only if "prompt" in only else document
    for key in ("prompt", "output", "workflow"):
        found = document.get(key)
        if isinstance(found, list) and len(found) > 2:
            found = found[2]  # number, id, prompt
        if isinstance(found, dict) and "class_type" not in found and found:
            return found
    return document


def _from_picture(path: Path, registry: Registry, seed: int | None) -> Graph:
    carried = pictures.read_texts(path)
    documents, faults = {}, []
    for key, text in carried.items():
        try:
            document = parse(text, f'{path} (its text "{key}")')
        except UsageError as error:
            faults.append(error)
            continue
        if document:  # programs that queue a prompt by themselves leave an empty workflow, or null, beside it
            documents[key] = document
    ui, api = documents.get("workflow"), documents.get("prompt")
    if api is not None and not _draws(ui):
        ui = None
    if ui is None and api is None:
        if faults:
            raise faults[0]
        other = pictures.other_texts(path)
        raise UsageError(
            f"{path} carries no workflow. Use a picture that ComfyUI or `retort run` saved with its metadata"
            if other is None
            else f"{path} carries settings of {other}, which are no workflow. Drop it into ComfyUI's window, which "
            "makes one of them, and save that"
        )
    if ui is None or (api is not None and subgraphs.has_subgraphs(ui)):
        # The prompt beside it is the same run with its subgraphs unfolded.
        graph = from_document(api, registry)
        graph.document = ui
    else:
        graph = from_document(ui, registry, seed)
    graph.notes += [f"{fault}; the other one was used" for fault in faults]
    return graph


def _draws(ui: Any) -> bool:
    """Whether a workflow in UI format has a node that runs, and not just notes."""
    nodes = _unwrapped(ui).get("nodes") if isinstance(ui, dict) else None
    kinds = [node.get("type") for node in nodes if isinstance(node, dict)] if isinstance(nodes, list) else []
    return any(kind not in workflow_ui.VIRTUAL for kind in kinds)


def _from_api(document: dict[str, Any]) -> Graph:
    nodes: dict[str, Node] = {}
    for id, raw in document.items():
        if not isinstance(raw, dict) or not isinstance(raw.get("class_type"), str):
            raise UsageError(f'node {id} has no "class_type". Export the workflow again with Workflow > Export (API)')
        meta = raw.get("_meta")
        title = meta.get("title") if isinstance(meta, dict) else None
        node = Node(id, raw["class_type"], title if isinstance(title, str) and title else raw["class_type"])
        inputs = raw.get("inputs", {})
        if not isinstance(inputs, dict):
            raise UsageError(f'node {id} "{node.title}": "inputs" must map names to values. Export the workflow again')
        for name, value in inputs.items():
            if _is_link(value):
                node.inputs[name] = Link(str(value[0]), value[1])
                continue
            holder, key = inputs, name
            if isinstance(value, dict) and "__value__" in value:
                holder, key, value = value, "__value__", value["__value__"]
            node.inputs[name] = value
            node.places[name] = Place(holder, key)
        nodes[id] = node
    return Graph(nodes)


def _is_link(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    source, slot = value
    return isinstance(source, str | int) and isinstance(slot, int) and not isinstance(slot, bool)
