"""Runs a workflow file from beginning to end; the command line and the tests call this."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..hosts.headless import folders, progress
from ..hosts.headless.folders import Folders
from . import registry, workflow
from .api.ui import saved_path
from .executor import Results, execute
from .graph import Graph
from .registry import Registry
from .validate import validate


@dataclass
class Outcome:
    """What came of a run: files in the order they were written, texts that nodes said or showed, notes, raw results.

    cancelled: the user stopped it, and the files are those that were finished before.
    """

    saved: list[Path]
    texts: list[str]
    notes: list[str]
    results: Results = field(default_factory=Results)
    cancelled: bool = False


class Runner(Protocol):
    """What runs workflows: `run` below with the built-in host, or ComfyUI."""

    def __call__(
        self, source: Path | dict[str, Any], *, where: Folders, sets: Sequence[str] = (), seed: int | None = None,
        watcher: progress.Watcher | None = None,
    ) -> Outcome:  # fmt: skip
        """Run a workflow into `where.output`. Raises UsageError for every mistake that the caller can mend."""
        ...


def run(
    source: Path | dict[str, Any],
    *,
    where: Folders | None = None,
    sets: Sequence[str] = (),
    seed: int | None = None,
    keep: Collection[str] = (),
    watcher: progress.Watcher | None = None,
    nodes: Registry | None = None,
) -> Outcome:
    """Run a workflow file (JSON or PNG), or one already parsed.

    sets: NODE.INPUT=VALUE assignments. seed: given to every seed. keep: ids of nodes whose outputs `results.outputs`
    shall hold. nodes: the nodes to know, by default core's and the plugin's. Raises UsageError for every mistake that
    the caller can mend.
    """
    return asyncio.run(_run(source, where or Folders.from_environment(), sets, seed, keep, watcher, nodes))


def prepared(source: Path | dict[str, Any], known: Registry, sets: Sequence[str], seed: int | None) -> Graph:
    """The graph of a workflow with the changes that `run` takes."""
    graph: Graph = (
        workflow.from_document(copy.deepcopy(source), known, seed)
        if isinstance(source, dict)
        else workflow.read(source, known, seed)
    )
    if seed is not None:
        graph.set_seed(seed)
    for assignment in sets:
        graph.assign(assignment)
    return graph


async def _run(source, where: Folders, sets, seed, keep, watcher, nodes) -> Outcome:
    with folders.use(where), progress.watched_by(watcher), progress.heard() as said:
        known = nodes if nodes is not None else await registry.everything()
        graph = prepared(source, known, sets, seed)
        order = validate(graph, known)
        results = await execute(graph, order, known, keep)
        shown = results.shown.values()
        return Outcome(
            saved=[saved_path(image) for ui in shown for image in ui.get("images", []) if isinstance(image, dict)],
            texts=[*said, *(str(text) for ui in shown for text in ui.get("text", []))],
            notes=graph.notes,
            results=results,
        )
