"""What a page may do with a run that has ended: delete it, give it another name, take it away as one file.

All names come from whoever sent the request; errors are those of `view.run_folder`, and ValueError for a run
that goes on.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ...files.atomic import checked_name
from ...files.folder import Inside, inside
from ...files.log_file import METRICS
from ...trainers.job import JOB
from ...trainers.job_watch import holding
from ...trainers.loop import CONFIG
from .. import recognise
from ..prompted import Source
from . import graph as run_graph
from .view import MOST_TEXT, run_folder, summary

CARD = "README.md"
PREVIEW = re.compile(r"previews/step_\d{1,12}\.png")
_TAKEN = (CONFIG, JOB, METRICS)
MOST_PICTURES = 200
MOST_FILES = 16  # on a card


def delete(folder: Path, name: str) -> None:
    """Delete a run with its checkpoints and previews. Its finished LoRA, which lies with the others, stays."""
    run = _ended(folder, name)
    with holding(run):
        pass
    (inside(folder) / run.name).remove_tree()


def rename(folder: Path, name: str, wanted: str) -> None:
    """Give a run another name. ValueError where one has it. Its finished LoRA keeps its own."""
    run, target = _ended(folder, name), folder / checked_name(wanted)
    if target.exists() or target.is_symlink():
        raise ValueError(f"there is a run called {wanted!r:.140} already: choose another name")
    with holding(run):
        pass
    os.rename(run, target)


def keep(folder: Path, loras: Path, name: str, step: int, wanted: str) -> str:
    """Copy a run's checkpoint to the LoRAs, whole or not at all, and return the file's name there.

    ValueError for a name that cannot be or is taken, FileNotFoundError where the run has no such checkpoint.
    """
    run = run_folder(folder, name)
    source = inside(run) / "checkpoints" / f"step_{step:07d}.safetensors"
    if not source.is_file():
        raise FileNotFoundError(f"the run {run.name} has kept no checkpoint of step {step}")
    file = f"{checked_name(wanted)}.safetensors"
    if inside(loras).write_first([file], source.read()) is None:
        raise ValueError(f"there is a LoRA called {wanted!r:.140} already: choose another name")
    return file


def export(folder: Path, loras: Path, name: str) -> BinaryIO:
    """A zip of a run, to be read from its beginning: LoRA, settings, log, previews and a model card."""
    run = run_folder(folder, name)
    files, told = inside(run), summary(run)
    made = tempfile.TemporaryFile()  # noqa: SIM115 (the reader closes it)
    try:
        with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
            for path, place in _parts(files, loras, str(told.get("lora", ""))):
                with path.open() as source, archive.open(f"{run.name}/{place}", "w", force_zip64=True) as target:
                    while data := source.read(1 << 20):
                        target.write(data)
            used = _files_of(run_graph.of_run(run))
            archive.writestr(f"{run.name}/{CARD}", card(run.name, told, _settings(files), used))
        made.seek(0)
    except BaseException:
        made.close()
        raise
    return made


def card(name: str, told: Mapping[str, Any], settings: Mapping[str, Any], files: Sequence[str] = ()) -> str:
    """A model card in Markdown: what a LoRA was trained on and how it is used.

    told: what `view.summary` gives. files: of model, text encoder and VAE, the model's first.
    """
    named = dict(told.get("base") or {})
    if named.pop("kind", "") == "embedded":
        named = {"variant": f"Retort Demo Model ({named.get('variant', '')})"}
    base = " and ".join(named.values()) or next(iter(files), "")
    head = {"tags": ["lora", "comfyui", "retort"], **({"base_model": base} if base else {})}
    steps = told.get("timesteps") or []
    lines = [
        "---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", "",
        f"# {name}", "",
        f"A LoRA that was trained with Retort: method {told.get('method') or 'unknown'}, {told.get('step', 0)} steps"
        f"{f', on {base}' if base else ''}.", "",
    ]  # fmt: skip
    if steps:
        lines += [f"It draws in {len(steps)} steps, at the timesteps {', '.join(f'{t:g}' for t in steps)}.", ""]
    elif (drawn := told.get("sampling") or {}).keys() >= {"steps", "cfg"}:
        lines += [f"Its previews were drawn in {drawn['steps']:g} steps at cfg {drawn['cfg']:g}, at strength 1.", ""]
    if PREVIEW.fullmatch(str(told.get("preview") or "")):
        lines += [f"![What it draws]({told['preview']})", ""]
    if files:
        lines += [f"It was trained with {', '.join(files)}.", ""]
    if len(told.get("size") or ()) == 2:
        lines += ["Its first picture has {} x {} pixels.".format(*told["size"]), ""]
    if told.get("prompt"):
        lines += ["The first prompt that it was trained on:", "", f"> {' '.join(str(told['prompt']).split())}", ""]
    return "\n".join([*lines, "## Settings", "", "```json", json.dumps(settings, indent=2), "```", ""])


def _files_of(graph: Mapping[str, Any]) -> list[str]:
    """The files that a training's loaders name, those of its model first. graph: as of `graph.of_run`."""
    if not graph:
        return []
    prompt = graph["prompt"]
    values = [value for one in prompt.values() for value in one["inputs"].values() if isinstance(value, str)]
    named = [value for value in values if value.lower().endswith(recognise.ENDINGS)]
    model = recognise.files_of(Source(prompt, graph["node"]).get("model"))
    # On one line each: a name may be a stranger's.
    return [" ".join(name.split())[:MOST_TEXT] for name in dict.fromkeys([*model, *named])][:MOST_FILES]


def _ended(folder: Path, name: str) -> Path:
    run = run_folder(folder, name)
    if summary(run)["state"] in ("running", "queued"):
        raise ValueError(f"the run {run.name} goes on: stop it first")
    inside(run).refuse_links()
    return run


def _parts(files: Inside, loras: Path, lora: str) -> Iterator[tuple[Inside, str]]:
    for name in _TAKEN:
        if (files / name).is_file():
            yield files / name, name
    for picture in (files / "previews").files()[-MOST_PICTURES:]:
        yield files / "previews" / picture, f"previews/{picture}"
    if lora and (found := inside(loras) / f"{checked_name(lora)}.safetensors").is_file():
        yield found, found.name


def _settings(files: Inside) -> Mapping[str, Any]:
    try:
        found = json.loads((files / CONFIG).read())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
