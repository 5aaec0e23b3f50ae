"""What a page sees of training runs, and what it may ask of them: names and numbers, and pictures by name.

All names come from whoever sent the request. `folder` is the host's `runs_folder()`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..trainers.chart import LEFT_OUT
from ..trainers.files import checked_name
from ..trainers.job import JOB, read_json
from ..trainers.job_watch import COMMANDS, STATUS, read_status, send
from ..trainers.loop import CONFIG
from ..trainers.watch import METRICS
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
    for entry in folder.iterdir() if folder.is_dir() else ():
        times = [path.stat().st_mtime for path in (entry / STATUS, entry / METRICS) if path.is_file()]
        if times and not entry.is_symlink():
            found.append((max(times), entry))
    latest = sorted(found, key=lambda pair: pair[0], reverse=True)[:MOST_RUNS]
    return [{"name": entry.name, "when": when, **summary(entry)} for when, entry in latest]


def summary(run: Path) -> dict[str, Any]:
    """Where a run stands: the fields of `Status`, which runs of earlier versions and of scripts may lack; its settings.

    method; timesteps: a few-step student's, empty for others; base: as job.json names it, None
    where no file is the whole of it.
    """
    config, result = _object(run / CONFIG), _object(run / RESULT)
    base = result.get("base") or _object(run / JOB).get("base")
    steps = result.get("timesteps")
    known: dict[str, Any] = {
        "method": str(config.get("method", "")),
        "timesteps": [step for step in steps if _is_number(step)] if isinstance(steps, list) else [],
        "base": base if isinstance(base, dict) else None,
    }
    if (run / STATUS).is_file():
        try:
            return known | asdict(read_status(run))
        except ValueError as error:
            return known | {"state": "failed", "message": str(error), "step": last_step(run / METRICS)}
    training = config.get("training")
    total = training.get("steps", 0) if isinstance(training, dict) else 0
    state = "finished" if result.get("file") else "stopped"
    return known | {
        "state": state, "step": last_step(run / METRICS), "steps": total, "lora": str(result.get("file", "")),
        "message": "", "rate": 0.0, "eta": None,
    }  # fmt: skip


def log(run: Path, offset: int, step: int) -> dict[str, Any]:
    """What a run's log holds from byte `offset` on, by columns, and which steps have a save point or a picture.

    step: the last one before `offset`, 0 at the beginning. Where the log has another line there, as when a run went on
    from an earlier save, the answer begins anew and says `restart`. `more`: the answer ends before the log does.
    """
    path = run / METRICS
    rows, end, more, restart = [], 0, False, False
    if path.is_file():
        with open(path, "rb") as handle:
            size = handle.seek(0, 2)
            restart = offset > 0 and (offset > size or _step_before(handle, offset) != step)
            start = 0 if restart else offset
            handle.seek(start)
            data = handle.read(CHUNK)
            # The line that is being written now is for the next look.
            end = start + data.rfind(b"\n") + 1
            more = len(data) == CHUNK and end > start
        rows = [row for row in map(_row, data[: end - start].splitlines()) if row is not None]
    names = sorted({key for row in rows for key, value in row.items() if _is_number(value)} - {"step"})
    return {
        "restart": restart or offset == 0,
        "offset": end,
        "more": more,
        "steps": [row["step"] for row in rows],
        "values": {name: [row.get(name) if _is_number(row.get(name)) else None for row in rows] for name in names},
        "hidden": sorted(LEFT_OUT & set(names)),
        "saves": _numbers(run / "checkpoints"),
        "pictures": _numbers(run / "previews"),
        "status": summary(run),
    }


def picture(run: Path, name: str) -> Path:
    """A preview's file. ValueError for a name that is none, FileNotFoundError where it is not there."""
    if not _PICTURE.fullmatch(name):
        raise ValueError(f"{name!r:.80} is no preview's name: they are called step_0000100.png")
    path = run / "previews" / name
    if path.is_symlink() or not path.is_file():
        raise FileNotFoundError(f"the run {run.name} has no picture {name}")
    return path


def command(run: Path, wish: str) -> None:
    """Ask a run that goes on to stop, save or sample. ValueError for another wish, or a run that has ended."""
    if wish not in COMMANDS:
        raise ValueError(f"command {wish!r:.40} is not known; use one of {', '.join(COMMANDS)}")
    status = read_status(run)
    if not status.going:
        raise ValueError(f"the run {run.name} does not go on ({status.state}), so it cannot {wish}")
    send(run, wish)


def last_step(path: Path) -> int:
    """The last step in a log, 0 where there is none."""
    if not path.is_file():
        return 0
    with open(path, "rb") as handle:
        return _step_before(handle, handle.seek(0, 2)) or 0


def _step_before(handle: Any, offset: int) -> int | None:
    """The step of the last whole line that ends at or before `offset`."""
    start = max(0, offset - TAIL)
    handle.seek(start)
    lines = handle.read(offset - start).split(b"\n")[:-1]
    row = _row(lines[-1]) if lines else None
    return None if row is None else row["step"]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _numbers(folder: Path) -> list[int]:
    names = (entry.name for entry in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in map(_NUMBERED.fullmatch, names) if match)


def _object(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except ValueError:
        # A stranger's run, or one that is being written: what is known of it without the file is shown.
        return {}
    return value if isinstance(value, dict) else {}
