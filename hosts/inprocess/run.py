"""Runs workflows with ComfyUI's own executor in this process: read here, checked and run there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import execution
import folder_paths
import latent_preview
from comfy.cli_args import LatentPreviewMethod
from comfy_execution.caching import BasicCache

from ...files.errors import NodeError, UsageError
from ...graphs import validate, workflow
from ...graphs.graph import Graph, Node
from ...graphs.run import Outcome, prepared
from ..headless import progress
from ..headless.folders import Folders
from ..workflow_doctor import MEDIA, MODELS
from .server import CLIENT
from .session import Session

# As the headless host names the folder of what is only to be looked at.
PREVIEWS = "preview"
# What a node raises for inputs that cannot work; anything else is a failure of the node.
MISTAKES = ("ValueError", "UsageError", "NodeError")
OLDER = "If the workflow was saved by another version of the node, open it in ComfyUI and save it again"


def run(
    session: Session, source: Path | dict[str, Any], *, where: Folders, sets: Sequence[str] = (),
    seed: int | None = None, watcher: progress.Watcher | None = None, previews: bool = False,
) -> Outcome:  # fmt: skip
    """Run a workflow (see `graphs.run.Runner`). Ctrl-C stops it at the node's next step; twice, at once.

    previews: what nodes show while they work is kept in the folder of previews, a picture for each node, and the
    samplers draw it in ComfyUI's usual way where its own arguments name none.

    Raises UsageError for what the caller can mend, NodeError where a node is at fault.
    """
    _use(where)
    server = session.server
    graph = prepared(source, session.known, sets, seed)
    replaced = graph.prompt()
    server.node_replace_manager.apply_replacements(replaced)
    if any(replaced[id]["class_type"] != node.class_type for id, node in graph.nodes.items()):
        renewed = workflow.from_document(replaced, session.known)
        renewed.document, renewed.notes = graph.document, graph.notes
        graph = renewed
    outputs, order = validate.needed(graph, session.known)
    prompt, key = graph.prompt(), str(uuid.uuid4())
    folder = where.output.resolve() / PREVIEWS if previews else None
    server.begin({id: graph.nodes[id].title for id in order}, folder)
    prompt = server.trigger_on_prompt({"prompt": prompt, "client_id": CLIENT})["prompt"]
    refuse(graph, prompt, outputs, key)
    document = {} if graph.document is None else {"extra_pnginfo": {"workflow": graph.document}}
    silent = latent_preview.default_preview_method is LatentPreviewMethod.NoPreviews
    drawn = {"preview_method": LatentPreviewMethod.Auto.value} if previews and silent else {}
    executor, shown = session.executor, dict[str, Any]()
    try:
        with progress.watched_by(watcher), _cancellable():
            executor.execute(prompt, key, {"client_id": CLIENT, **drawn, **document}, outputs)
        shown = executor.history_result["outputs"]
    finally:
        _forget(session, graph, outputs, shown)
    ended, told = executor.status_messages[-1]
    if ended == "execution_error":
        raise _failed(graph, told)
    return Outcome(
        saved=list(_files(shown)),
        texts=[*server.lines.values(), *(str(text) for ui in shown.values() for text in ui.get("text", ()))],
        notes=graph.notes,
        cancelled=ended == "execution_interrupted",
    )


def _forget(session: Session, graph: Graph, outputs: Sequence[str], shown: Mapping[str, Any]) -> None:
    """Let the next run write its own files, while models and whatever else is the same are kept.

    Objects of nodes know the output folder of the run that made them, and what has saved is not run again for the same
    inputs. What others may depend on, such as a training, is kept unless it wrote files that are shown.
    """
    caches = session.executor.caches
    if not isinstance(caches.outputs, BasicCache) or not caches.outputs.initialized:
        return
    caches.objects.cache.clear()
    caches.objects.subcaches.clear()
    for id in outputs:
        if not session.known.schema(graph.nodes[id]).outputs or list(_files({id: shown.get(id, {})})):
            caches.outputs.cache.pop(caches.outputs.cache_key_set.get_data_key(id), None)


def _use(where: Folders) -> None:
    output = where.output.resolve()
    folder_paths.set_output_directory(str(output))
    folder_paths.set_temp_directory(str(output / PREVIEWS))
    inputs = [path for path in where.inputs if path.is_dir()]
    if len(inputs) > 1:
        raise UsageError(
            f"--input: ComfyUI reads pictures from one folder, and {', '.join(map(str, inputs))} were named: name one"
        )
    if inputs:
        folder_paths.set_input_directory(str(inputs[0].resolve()))


@contextlib.contextmanager
def _cancellable() -> Iterator[None]:
    """Let the first Ctrl-C stop ComfyUI at the next point where it looks, and the second at once."""

    def stop(number: int, frame: Any) -> None:
        if comfy.model_management.processing_interrupted():
            raise KeyboardInterrupt
        comfy.model_management.interrupt_current_processing(True)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _files(shown: Mapping[str, Mapping[str, Any]]) -> Iterator[Path]:
    """The files that nodes wrote: pictures, sounds, videos and whatever else is shown as one."""
    for ui in shown.values():
        for entries in ui.values():
            for one in entries if isinstance(entries, list | tuple) else ():
                if isinstance(one, dict) and "filename" in one and one.get("type") in ("output", "temp"):
                    root = Path(folder_paths.get_directory_by_type(one["type"]))
                    yield root / one.get("subfolder", "") / one["filename"]


def refuse(graph: Graph, prompt: dict[str, Any], outputs: list[str], key: str) -> None:
    """Raise NodeError for the first thing that ComfyUI's own check of the outputs' nodes has to say."""
    # It logs all that it refuses, which is said once here.
    logging.disable(logging.ERROR)
    try:
        found = asyncio.run(execution.validate_prompt(key, prompt, outputs))
    finally:
        logging.disable(logging.NOTSET)
    _, error, _, refused = found
    for problem in problems(graph, refused):
        raise problem
    if error is not None:
        raise UsageError(f"{error['message']}: {error['details']}".rstrip(": "))


def problems(graph: Graph, refused: Mapping[str, Any]) -> Iterator[NodeError]:
    """What ComfyUI refuses, in its order, as our messages."""
    for id, node in refused.items():
        for error in node["errors"]:
            yield _refusal(graph.nodes[id], error)


def _refusal(node: Node, error: Mapping[str, Any]) -> NodeError:
    kind, more, details = error["type"], error["extra_info"], str(error["details"])
    value = more.get("received_value", NodeError.NO_VALUE)
    name = more.get("input_name")
    options: Mapping[str, Any] = (more.get("input_config") or (None, {}))[1]
    if kind == "required_input_missing":
        return NodeError(node, "it is required, and nothing is connected or typed", input=name, remedy="Connect it")
    if kind == "value_not_in_list":
        if isinstance(value, str) and value.lower().endswith((*MODELS, *MEDIA)):
            remedy = "`retort doctor WORKFLOW` says where this file comes from and goes"
            return NodeError(node, "this file is not there", input=name, value=value, remedy=remedy)
        choices = options.get("options") or (more.get("input_config") or [None])[0]
        listed = f"Choose {', '.join(map(str, choices[:20]))}. " if isinstance(choices, list) and choices else ""
        return NodeError(node, "this is not one of its choices", input=name, value=value, remedy=listed + OLDER)
    if kind in ("value_smaller_than_min", "value_bigger_than_max"):
        end = "min" if kind == "value_smaller_than_min" else "max"
        words = {"min": "at least", "max": "at most"}[end]
        allowed = f"Allowed: {options.get('min', 'any')} to {options.get('max', 'any')}"
        return NodeError(node, f"it must be {words} {options[end]}", input=name, value=value, remedy=allowed)
    if kind == "custom_validation_failed":
        return NodeError(node, details.partition(" - ")[2] or "its own check refuses this", input=name)
    if "exception" in kind:
        # Ours begin with the name of the input that they are about.
        name, colon, sentence = details.partition(": ")
        return NodeError(node, sentence, input=name) if colon and name in node.inputs else NodeError(node, details)
    return NodeError(node, f"{error['message']}: {details}", input=name, remedy=OLDER)


def _failed(graph: Graph, told: Mapping[str, Any]) -> NodeError:
    # A node that another unfolded has no place in the workflow.
    kind, id = told["node_type"], told["node_id"]
    node = graph.nodes.get(id) or Node(id, kind, kind)
    message = " ".join(str(told["exception_message"]).split())  # of several lines, with hints
    name = str(told["exception_type"]).rpartition(".")[2]
    if name in MISTAKES:
        problem = NodeError(node, message)
    else:
        problem = NodeError(node, f"it failed with {name}: {message}", remedy="--debug shows where")
    problem.__cause__ = RuntimeError("in ComfyUI:\n" + "".join(told["traceback"]))
    return problem
