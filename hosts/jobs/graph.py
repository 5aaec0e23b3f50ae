"""What a training was connected to: the part of its prompt that leads to it, kept with its run.

Whoever looks at the LoRA needs the same model, text encoder and VAE, whichever nodes they came from.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...files.atomic import write_json
from ...files.folder import inside
from ...files.log_file import METRICS
from ...files.strangers import read_json
from ...trainers.job import JOB
from .. import data_view

GRAPH = "graph.json"
MOST = 1_000_000  # bytes
CAPTIONED = "LoadImageTextDataSetFromFolder"  # core's node, which takes a missing text file for an empty caption

_log = logging.getLogger("retort.job")


def leading_to(prompt: Mapping[str, Any], node: str) -> dict[str, Any]:
    """The nodes of a prompt from which a node's inputs come, itself included, as the prompt has them."""
    found: dict[str, Any] = {}
    waiting = [node]
    while waiting:
        id = waiting.pop()
        if id in found or id not in prompt:
            continue
        inputs = dict(prompt[id]["inputs"])
        found[id] = {"class_type": prompt[id]["class_type"], "inputs": inputs}
        for value in inputs.values():
            if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str):
                waiting.append(value[0])
    return found


def uncaptioned(hidden: Any, inputs: Path) -> list[str]:
    """Sentences on folders of pictures with captions behind the node that trains, where pictures have none.

    inputs: the folder that they lie in. hidden: as of `keep`. Nothing is said of what cannot be read: its reader does.
    """
    prompt, node = (getattr(hidden, name, None) for name in ("prompt", "unique_id"))
    if not isinstance(prompt, Mapping) or not isinstance(node, str):
        return []
    loaders = [one for one in leading_to(prompt, node).values() if one["class_type"] == CAPTIONED]
    said = []
    for folder in dict.fromkeys(str(one["inputs"].get("folder", "")) for one in loaders):
        try:
            bare, of = data_view.without_caption(inputs, folder)
        except (OSError, ValueError):
            continue
        if bare:
            said.append(
                f"{bare} of {of} pictures in {folder} have no caption and are trained without one: Pictures in the "
                "Retort panel marks them"
            )
    return said


def keep(run: Path, hidden: Any) -> None:
    """Write down what leads to the node that trains; hidden: its `prompt` and `unique_id`, as the host tells them.

    Nothing is written for a run that has not begun, nor where the host tells nothing or too much.
    """
    prompt, node = (getattr(hidden, name, None) for name in ("prompt", "unique_id"))
    if not isinstance(prompt, Mapping) or not isinstance(node, str) or node not in prompt:
        return
    files = inside(run)
    if not any((files / name).is_file() for name in (METRICS, JOB)):
        return
    graph = {"node": node, "prompt": leading_to(prompt, node)}
    if len(json.dumps(graph)) > MOST:
        return
    try:
        write_json(files / GRAPH, graph)
    except OSError as error:
        # What was trained is worth more than this.
        _log.warning("what run %s was connected to is not kept: %s", run.name, error)


def of_run(run: Path) -> dict[str, Any]:
    """{"node": id, "prompt": {id: {"class_type", "inputs"}}} of a run, {} where it has none that can be read."""
    file = inside(run) / GRAPH
    try:
        found = read_json(file) if file.is_file() else {}
    except ValueError:
        # A stranger's run: its LoRA is opened without.
        return {}
    node, prompt = (found.get(name) if isinstance(found, dict) else None for name in ("node", "prompt"))
    if not isinstance(prompt, dict) or not isinstance(node, str) or node not in prompt:
        return {}
    whole = (
        isinstance(one, dict) and isinstance(one.get("class_type"), str) and isinstance(one.get("inputs"), dict)
        for one in prompt.values()
    )
    return {"node": node, "prompt": prompt} if all(whole) else {}
