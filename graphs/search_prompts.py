"""One search for each line of a list of prompts, shared out among processes; what is done is not done again."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..files import texts
from ..files.atomic import write_json
from ..files.errors import UsageError
from ..hosts.headless import folders, progress
from ..hosts.headless.folders import Folders
from . import registry, workflow
from .graph import Graph, Link
from .registry import Registry
from .run import Runner, run

SEARCHES = ("RetortTreeSearch", "RetortNoisePolicy")
RESULT = "result.json"


@dataclass(frozen=True)
class Row:
    """What came of one prompt: its number in the list, its folder, and the searches' texts."""

    number: int
    prompt: str
    folder: Path
    texts: tuple[str, ...]


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that hold something. UsageError when there is none, or no such file."""
    try:
        prompts = texts.prompts(texts.decode(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a text file: {error}") from error
    if not prompts:
        raise UsageError(f"{path} holds no prompts: write one in each line")
    return prompts


def search_prompts(
    source: Path, prompts: Sequence[str], *, where: Folders, at: Sequence[str] = (), sets: Sequence[str] = (),
    seed: int | None = None, share: tuple[int, int] = (0, 1), watcher: progress.Watcher | None = None,
    known: Registry | None = None, runner: Runner = run,
) -> Iterator[Row]:  # fmt: skip
    """Run a workflow for each prompt, into the folders 0000, 0001, ... of `where.output`.

    at: NODE.INPUT that get the prompt; empty: the String node that a search's `prompt` comes from. share: (rank,
    processes); a process takes each prompt whose number is its rank modulo their number, and the result does not depend
    on which one does. A prompt with a result of the same settings is left alone. runner: what runs the workflow, and
    known: the nodes that it knows; the built-in host and its nodes by default. A run that is cancelled ends the search
    by KeyboardInterrupt. Raises UsageError, as `run.run` does.
    """
    rank, world = share
    with folders.use(where):
        known = known or asyncio.run(registry.everything())
        graph = workflow.read(source, known)
    places = list(at) or _places(graph)
    for number in range(rank, len(prompts), world):
        prompt, folder = prompts[number], where.output / f"{number:04d}"
        changes = [*sets, *(f"{place}={prompt}" for place in places)]
        asked = {"prompt": prompt, "changes": changes, "seed": seed, "workflow": graph.prompt()}
        if _done(folder / RESULT, asked):
            continue
        started = time.monotonic()
        outcome = runner(source, where=replace(where, output=folder), sets=changes, seed=seed, watcher=watcher)
        if outcome.cancelled:
            raise KeyboardInterrupt
        images = [path.relative_to(folder).as_posix() for path in outcome.saved]
        found = {"texts": outcome.texts, "images": images, "seconds": time.monotonic() - started}
        # Written last: a prompt counts as done when all its files are there.
        write_json(folder / RESULT, {**asked, **found})
        yield Row(number, prompt, folder, tuple(outcome.texts))


def _places(graph: Graph) -> list[str]:
    searches = [node for node in graph.nodes.values() if node.class_type in SEARCHES]
    if not searches:
        raise UsageError(f"the workflow has no search: it needs one of the nodes {', '.join(SEARCHES)}")
    places: list[str] = []
    for node in searches:
        link = node.inputs.get("prompt")
        if not isinstance(link, Link) or not graph.nodes[link.node].class_type.startswith("PrimitiveString"):
            raise UsageError(
                f'node {node.id} "{node.title}" has a prompt of its own, which its text encoder would not get: connect '
                "both to one String node, or name all inputs that take the prompt by --at NODE.INPUT"
            )
        places.append(f"{link.node}.value")
    return list(dict.fromkeys(places))


def _done(path: Path, asked: dict) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and all(found.get(name) == value for name, value in asked.items())
