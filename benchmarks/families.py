"""Every model family of a ComfyUI checkout, each tried in a process of its own: what works on what.

`COMFYUI_PATH=... python -m retort.benchmarks.families [NAME ...] [COLUMN ...]` prints a table as markdown and writes
all of it, with what was refused and why, to --out; without names it tries all of them. Models that ComfyUI has and
`families.json` does not know stand at the end as rows of their own. It takes about half a minute a family. A row that
--out holds already is not tried again.

--further asks the families that most people use for more methods, --stored for their weights in other formats.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIMIT = 1800  # seconds for a family
FAILING = ("refused:", "FAILS:", "WRONG:")


def load(checkout: Path) -> None:
    """Import ComfyUI and Retort in this process, on the processor."""
    sys.path.insert(0, str(checkout))
    importlib.import_module("comfy.options")
    importlib.import_module("comfy.cli_args").args.cpu = True
    import torch

    torch.set_num_threads(1)
    utils: Any = importlib.import_module("comfy.utils")
    utils.PROGRESS_BAR_ENABLED = False
    for name in ("folder_paths", "comfy_extras.nodes_custom_sampler", "comfy.sd"):
        importlib.import_module(name)
    for name in ("hosts.comfyui.host", "hosts.training.run", "nodes.distilled", "nodes.reflection", "nodes.search"):
        importlib.import_module(f"retort.{name}")
    gc.freeze()  # each training collects garbage, and looks through all that is alive for it


def attempt(name: str, form: str, cells: tuple[str, ...], out: Path) -> None:
    """Try one family in one format, and write what came of it after every cell."""
    from .family_formats import StoredTrial
    from .family_networks import families
    from .family_trials import Trial, said

    folders: Any = importlib.import_module("folder_paths")
    row: dict[str, Any] = {"name": name, "form": form}
    with tempfile.TemporaryDirectory() as folder:
        folders.set_output_directory(f"{folder}/output")
        folders.folder_names_and_paths["loras"] = ([f"{folder}/loras"], {".safetensors"})
        for made in ("output", "loras"):
            (Path(folder) / made).mkdir()
        try:
            given = families()[name], lambda module: importlib.import_module(f"retort.{module}"), Path(folder)
            trial = StoredTrial(*given, form) if form else Trial(*given)
        except Exception as error:
            row["not made"] = said(error)
            out.write_text(json.dumps(row), encoding="utf-8")
            return
        base = trial.model.model
        row |= {"network": type(base.diffusion_model).__name__, "type": base.model_type.name, "cells": {}}
        for cell, found in trial.run(cells):
            row["cells"][cell] = found
            out.write_text(json.dumps(row), encoding="utf-8")


def apart(name: str, form: str, cells: tuple[str, ...]) -> dict[str, Any]:
    """What came of one family in a process of its own, which begins as a copy of this one."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        process = multiprocessing.get_context("fork").Process(target=attempt, args=(name, form, cells, out))
        process.start()
        process.join(LIMIT)
        ended = ""
        if process.is_alive():
            process.kill()
            process.join()
            ended = f"took more than {LIMIT} s"
        elif process.exitcode:
            ended = f"its process ended with {process.exitcode}"
        row: dict[str, Any] = {"name": name, "form": form}
        row |= json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    if ended:
        row["not made"] = ended
    return row


def verdict(cell: str) -> str:
    """A cell in one word."""
    return {"": "–", "ok": "yes"}.get(cell, cell.partition(":")[0])


def clean(row: dict[str, Any]) -> bool:
    """Whether everything that was tried is right."""
    return "not made" not in row and not any(found.startswith(FAILING) for found in row["cells"].values())


def markdown(rows: list[dict[str, Any]], cells: list[str]) -> str:
    """All rows as a table."""
    lines = [f"| family | network | sampling | {' | '.join(cells)} |", "|---" * (3 + len(cells)) + "|"]
    for row in rows:
        name = f"{row['name']}, {row['form']}" if row["form"] else row["name"]
        if "cells" not in row:
            lines.append(f"| {name} | {row.get('not made', '')} |" + " |" * (1 + len(cells)))
            continue
        words = [verdict(row["cells"].get(cell, "")) for cell in cells]
        lines.append(f"| {name} | {row['network']} | {row['type']} | {' | '.join(words)} |")
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    from .family_formats import PRECISIONS, STORED
    from .family_networks import MOST_USED, families, unknown
    from .family_trials import CELLS, FURTHER

    known = families()
    parser = argparse.ArgumentParser(description="Try every model family of ComfyUI.")
    parser.add_argument("names", nargs="*", help="families, and columns; none: all")
    parser.add_argument("--further", action="store_true", help="six more methods, on the families most used")
    parser.add_argument("--stored", nargs="*", metavar="FORM", help=f"weights in {', '.join(PRECISIONS)}; none: all")
    parser.add_argument("--out", type=Path, default=Path("output/families.json"), help="where all of it is written")
    given = parser.parse_args()
    forms = [""] if given.stored is None else list(given.stored or PRECISIONS)
    columns = list(STORED if given.stored is not None else FURTHER if given.further else CELLS)
    cells = tuple(name for name in given.names if name in columns) or tuple(columns)
    names = [name for name in given.names if name not in columns]
    if missing := [name for name in names if name not in known]:
        parser.error(f"there is no family {missing[0]}; there are {', '.join(known)}")
    names = names or list(MOST_USED if given.further or given.stored is not None else known)
    out = given.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    load(Path(os.environ["COMFYUI_PATH"]).resolve())
    rows: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    tried = {(row["name"], row["form"]) for row in rows}
    for name, form in [(name, form) for name in names for form in forms if (name, form) not in tried]:
        began, large = time.monotonic(), known[name].too_large
        refused = {"name": name, "form": form, "not made": f"not tried: {large}"}
        rows.append(refused if large else apart(name, form, cells))
        words = {cell: found for cell, found in rows[-1].get("cells", {}).items() if found not in ("ok", "")}
        seconds = time.monotonic() - began
        sys.stderr.write(f"{name} {form} {seconds:.0f} s {rows[-1].get('not made', '')} {words or 'clean'}\n")
        out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    if names == list(known):
        rows += [{"name": name, "form": "", "not made": "not tried: no tiny settings yet"} for name in unknown()]
    done = [row for row in rows if "cells" in row]
    sys.stdout.write(markdown(rows, list(cells)) + "\n\n")
    sys.stdout.write(f"{sum(map(clean, done))} of {len(done)} without a refusal or failure\n")


if __name__ == "__main__":
    main()
