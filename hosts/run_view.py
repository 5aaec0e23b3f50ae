"""What a page sees of training runs, and what it may ask of them: names and numbers, and pictures by name.

All names come from whoever sent the request. `folder` is the host's `runs_folder()`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..trainers.chart import LEFT_OUT
from ..trainers.entries import LinkError
from ..trainers.files import checked_name
from ..trainers.folder import Inside, inside
from ..trainers.job import JOB
from ..trainers.job_watch import COMMANDS, STATUS, read_status, send, started
from ..trainers.loop import CONFIG
from ..trainers.strangers import read_json
from ..trainers.watch import METRICS, read_row
from .training import RESULT

MOST_RUNS = 200
# Of a log in one answer: about four megabytes.
CHUNK = 1 << 22
TAIL = 4096
_NUMBERED = re.compile(r"step_(\d{1,12})\.(?:png|safetensors)")
_PICTURE = re.compile(r"step_\d{1,12}\.png")


def run_folder(folder: Path, name: str) -> Path:
    """The folder of a run. ValueError for a name that leads elsewhere, FileNotFoundError where there is no such run."""
    found = folder / checked_name(name)
    if not found.is_dir():
        raise FileNotFoundError(f"there is no run called {name!r:.140}")
    if found.resolve().parent != folder.resolve():
        raise ValueError(f"the run {name!r:.140} is a link to another place")
    return found


def runs(folder: Path) -> list[dict[str, Any]]:
    """The runs, latest first: name, `when` (seconds since 1970), method, base and what `summary` gives."""
    found: list[tuple[float, Path]] = []
    for name in inside(folder).folders():
        when = max(_changed(inside(folder) / name / file) for file in (STATUS, METRICS))
        if when:
            found.append((when / 1e9, folder / name))
    latest = sorted(found, key=lambda pair: pair[0], reverse=True)[:MOST_RUNS]
    return [{"name": entry.name, "when": when, **summary(entry)} for when, entry in latest]


def summary(run: Path) -> dict[str, Any]:
    """Where a run stands: the fields of `Status`, which runs of earlier versions and of scripts may lack; its settings.

    method; timesteps: a few-step student's, empty for others; base: as job.json names it, None
    where no file is the whole of it.
    """
    files = inside(run)
    config, result = _object(files / CONFIG), _object(files / RESULT)
    base = result.get("base") or _object(files / JOB).get("base")
    steps = result.get("timesteps")
    known: dict[str, Any] = {
        "method": str(config.get("method", "")),
        "timesteps": [step for step in steps if _is_number(step)] if isinstance(steps, list) else [],
        "base": base if isinstance(base, dict) else None,
    }
    try:
        if started(files):
            return known | asdict(read_status(files))
    except LinkError as error:
        return known | {"state": "failed", "message": str(error), "step": 0}
    except ValueError as error:
        return known | {"state": "failed", "message": str(error), "step": last_step(files / METRICS)}
    training = config.get("training")
    total = training.get("steps", 0) if isinstance(training, dict) else 0
    state = "finished" if result.get("file") else "stopped"
    return known | {
        "state": state, "step": last_step(files / METRICS), "steps": total, "lora": str(result.get("file", "")),
        "message": "", "rate": 0.0, "eta": None,
    }  # fmt: skip


def log(run: Path, offset: int, step: int) -> dict[str, Any]:
    """What a run's log holds from byte `offset` on, by columns, and which steps have a save point or a picture.

    step: the last one before `offset`, 0 at the beginning. Where the log has another line there, as when a run went on
    from an earlier save, the answer begins anew and says `restart`. `more`: the answer ends before the log does.
    """
    path = inside(run) / METRICS
    rows, end, more, restart = [], 0, False, False
    if path.is_file():
        with path.open() as handle:
            size = handle.seek(0, 2)
            restart = offset > 0 and (offset > size or _step_before(handle, offset) != step)
            start = 0 if restart else offset
            handle.seek(start)
            data = handle.read(CHUNK)
            # The line that is being written now is for the next look.
            end = start + data.rfind(b"\n") + 1
            more = len(data) == CHUNK and end > start
        rows = [row for row in map(read_row, data[: end - start].splitlines()) if row is not None]
    names = sorted({key for row in rows for key, value in row.items() if _is_number(value)} - {"step"})
    return {
        "restart": restart or offset == 0,
        "offset": end,
        "more": more,
        "steps": [row["step"] for row in rows],
        "values": {name: [row.get(name) if _is_number(row.get(name)) else None for row in rows] for name in names},
        "hidden": sorted(LEFT_OUT & set(names)),
        "saves": _numbers(inside(run) / "checkpoints"),
        "pictures": _numbers(inside(run) / "previews"),
        "status": summary(run),
    }


def picture(run: Path, name: str) -> Path:
    """A preview's file. ValueError for a name that is none, FileNotFoundError where it is not there."""
    if not _PICTURE.fullmatch(name):
        raise ValueError(f"{name!r:.80} is no preview's name: they are called step_0000100.png")
    path = inside(run) / "previews" / name
    if not path.is_file():
        raise FileNotFoundError(f"the run {run.name} has no picture {name}")
    return path.path


def command(run: Path, wish: str) -> None:
    """Ask a run that goes on to stop, save or sample. ValueError for another wish, or a run that has ended."""
    if wish not in COMMANDS:
        raise ValueError(f"command {wish!r:.40} is not known; use one of {', '.join(COMMANDS)}")
    inside(run).refuse_links()
    status = read_status(run)
    if not status.going:
        raise ValueError(f"the run {run.name} does not go on ({status.state}), so it cannot {wish}")
    send(run, wish)


def last_step(path: Inside) -> int:
    """The last step in a log, 0 where there is none."""
    if not path.is_file():
        return 0
    with path.open() as handle:
        return _step_before(handle, handle.seek(0, 2)) or 0


def _step_before(handle: Any, offset: int) -> int | None:
    """The step of the last whole line that ends at or before `offset`."""
    start = max(0, offset - TAIL)
    handle.seek(start)
    lines = handle.read(offset - start).split(b"\n")[:-1]
    row = read_row(lines[-1]) if lines else None
    return None if row is None else row["step"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _changed(path: Inside) -> int:
    try:
        return path.changed()
    except LinkError:
        return 1  # the list says so


def _numbers(folder: Inside) -> list[int]:
    return sorted(int(match[1]) for match in map(_NUMBERED.fullmatch, folder.files()) if match)


def _object(path: Inside) -> Mapping[str, Any]:
    try:
        if not path.is_file():
            return {}
        value = read_json(path)
    except ValueError:
        # A stranger's run, or one that is being written: what is known of it without the file is shown.
        return {}
    return value if isinstance(value, dict) else {}
