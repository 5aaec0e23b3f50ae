"""What a page sees of searches, and the latents that it may take from one.

All names come from whoever sent the request. `records` is the host's `search_records()`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..trainers.folder import Inside, inside
from ..trainers.strangers import read_json
from .search_record import VIEW

NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
MOST_FILES = 200
VIEW_BYTES = 2**26


def searches(records: Path, saved: Path, pid: int) -> dict[str, Any]:
    """The searches that this process has records of, latest first, without their trees; and the saved ones by name.

    pid: of this process; a record of another one that says it goes on was left by a crash.
    """
    found = []
    for name in filter(NAME.fullmatch, reversed(inside(records).folders())):
        if (inside(records) / name / VIEW).is_file():
            view = record(records, name, pid)
            for item in filter(None, view["items"]):
                del item["tree"], item["kept"]
            found.append(view)
    files = [name for name in inside(saved).files() if name.endswith(".safetensors")]
    files.sort(key=lambda name: -(inside(saved) / name).changed())
    return {"searches": found, "saved": [name.removesuffix(".safetensors") for name in files[:MOST_FILES]]}


def record(records: Path, name: str, pid: int) -> dict[str, Any]:
    """A search whole, its name with it. ValueError for a name that is none, FileNotFoundError where it is not there."""
    path = _folder(records, name) / VIEW
    if not path.is_file():
        raise FileNotFoundError(f"the search {name} has found nothing yet")
    view = read_json(path, VIEW_BYTES, finite=False)
    view["going"] &= view.pop("pid") == pid
    return {"name": name, **view}


def picture(records: Path, name: str, item: int, number: int) -> Path:
    """A candidate's picture; errors as of `record`."""
    return _candidate(records, name, item, number, "jpg").path


def take(records: Path, inputs: Path, name: str, item: int, number: int) -> str:
    """Put a candidate's latent where Load Latent finds it, and return the file's name there; errors as of `record`."""
    source = _candidate(records, name, item, number, "latent")
    file = f"retort_{name}_{item}_{number}.latent"
    (inside(inputs) / file).write(source.read())
    return file


def _folder(records: Path, name: str) -> Inside:
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r:.80} is no search's name")
    return inside(records) / name


def _candidate(records: Path, name: str, item: int, number: int, ending: str) -> Inside:
    path = _folder(records, name) / f"item_{item}" / f"{number}.{ending}"
    if not path.is_file():
        raise FileNotFoundError(f"the search {name} has not kept candidate {number}: only the best are")
    return path
