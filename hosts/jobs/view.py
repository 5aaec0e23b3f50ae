"""What a page sees of training runs, and what it may ask of them: names and numbers, and pictures by name.

All names come from whoever sent the request. `folder` is the host's `runs_folder()`.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, get_args

from ...files.atomic import checked_name
from ...files.folder import Inside, inside
from ...files.log_file import METRICS, Row, chosen, last_step, row_before, rows_of, sample
from ...files.strangers import read_json
from ...trainers.chart import LEFT_OUT
from ...trainers.job import JOB
from ...trainers.job_watch import COMMANDS, MOST_MESSAGE, STATUS, has_status, read_status, send
from ...trainers.loop import CONFIG, SHEET, STUDENT
from ...trainers.methods import METHODS
from ...trainers.objectives.flow_matching import Expert
from ...trainers.watch import columns_of
from ..training.run import RESULT

MOST_RUNS = 200
MOST_LIST = 800_000  # bytes of the list as JSON
# Of a log in one answer: bytes that are read, and numbers that are sent.
CHUNK, MOST_NUMBERS = 1 << 19, 36_000
# A log that has grown by more since the last look is thinned to so many rows, but for its end.
LONG, MOST_ROWS = 1 << 22, 2000
MOST_FILES = 1000  # save points and pictures that are named
MOST_TEXT, MOST_TIMESTEPS = 255, 100
MOST_SETTINGS, MOST_ON_SHEET = 200, 256
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


def latest(folder: Path, most: int) -> list[str]:
    """The names of the runs that were trained last."""
    found = sorted(_when(folder), reverse=True) if folder.is_dir() else []
    return [name for _, name in found[:most]]


def runs(folder: Path) -> list[dict[str, Any]]:
    """The runs, latest first: name, `when` (seconds since 1970), method, base and what `summary` gives, but logs."""
    found = sorted(_when(folder), reverse=True)[:MOST_RUNS] if folder.is_dir() else []
    listed, size = [], 0
    for when, name in found:
        entry = {"name": name, "when": when, **_ended(folder / name)}
        entry.pop("log", None)
        size += len(json.dumps(entry))
        if size > MOST_LIST:
            break
        listed.append(entry)
    return listed


def _ended(run: Path) -> dict[str, Any]:
    """The summary of a run, kept of one that has ended well while none of its files changes."""
    stamp = tuple(_stamp(f"{run}{os.sep}{name}") for name in (STATUS, METRICS, CONFIG, RESULT, JOB))
    before = _kept.get(run)
    if before is not None and before[0] == stamp:
        return before[1]
    found = summary(run)
    with _keeping:
        _kept.pop(run, None)
        if found["state"] in ("finished", "stopped"):
            _kept[run] = stamp, found
            while len(_kept) > 2 * MOST_RUNS:
                del _kept[next(iter(_kept))]
    return found


_keeping = threading.Lock()
_kept: dict[Path, tuple[tuple[Any, ...], dict[str, Any]]] = {}


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _when(folder: Path) -> list[tuple[float, str]]:
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                continue
            times = []
            for name in (STATUS, METRICS):
                try:
                    # Of a link itself: whoever opens it is told.
                    times.append(os.lstat(f"{entry.path}{os.sep}{name}").st_mtime)
                except OSError:
                    continue
            if times:
                found.append((max(times), entry.name))
    return found


def summary(run: Path) -> dict[str, Any]:
    """Where a run stands: the fields of `Status`, which runs of earlier versions and of scripts may lack; its settings.

    method; timesteps and sigmas: where a few-step student is called, empty for others; mode: what it does between them;
    student: whether the LoRA carries its recipe; base: as job.json names it, None where no file is the whole of it;
    prompt: the first that it trained on; latent, size: the shape of its first latent, and that picture's width and
    height, empty where they are not known; sampling: steps and cfg of its previews, and which of two experts is
    trained, where the method has them.
    """
    files = inside(run)
    config, result = _object(files / CONFIG), _object(files / RESULT)
    base = result.get("base") or _object(files / JOB).get("base")
    method = str(config.get("method", ""))
    known: dict[str, Any] = {
        "method": method[:MOST_TEXT],
        "mode": METHODS[method].objective.student_rule.mode if method in METHODS else "",
        "timesteps": _list(result.get("timesteps")),
        "sigmas": _list(_object(files / STUDENT).get("sigmas") or result.get("sigmas")),
        "student": result.get("student") is True,
        "base": _texts(base) if isinstance(base, dict) else None,
        "prompt": str(result.get("prompt", ""))[:MOST_MESSAGE],
        "latent": _list(result.get("latent")),
        "size": _list(result.get("size")),
        "sampling": _sampling(config.get("objective")),
    }
    try:
        if has_status(files):
            return known | asdict(read_status(files))
        step = last_step(files / METRICS)
    except (ValueError, OSError) as error:
        return known | {"state": "failed", "message": str(error)[:MOST_MESSAGE], "step": _step(files / METRICS)}
    training = config.get("training")
    total = training.get("steps", 0) if isinstance(training, dict) else 0
    state = "finished" if result.get("file") else "stopped"
    return known | {
        "state": state, "step": step, "steps": total if _is_number(total) else 0,
        "lora": str(result.get("file", ""))[:MOST_TEXT], "message": "", "rate": 0.0, "eta": None,
    }  # fmt: skip


def _sampling(objective: Any) -> dict[str, Any]:
    found = objective if isinstance(objective, Mapping) else {}
    numbers = {name: found[name] for name in ("steps", "cfg") if _is_number(found.get(name))}
    return numbers | ({"expert": found["expert"]} if found.get("expert") in get_args(Expert) else {})


def log(run: Path, offset: int, step: int) -> dict[str, Any]:
    """What a run's log holds from byte `offset` on, by columns, and which steps have a save point or a picture.

    step: the last one before `offset`, 0 at the beginning. Where the log has another line there, as when a run went on
    from an earlier save, the answer begins anew and says `restart`. `more`: the answer ends before the log does.
    `thinned`: how many bytes were looked at here and there only, since there were many.
    """
    path = inside(run) / METRICS
    rows: list[Row] = []
    end, more, restart, thinned = 0, False, False, 0
    if path.is_file():
        with path.open() as handle:
            size = handle.seek(0, 2)
            restart = offset > 0 and (offset > size or _other(handle, offset, step))
            start = 0 if restart else offset
            if size - start > LONG:
                handle.seek(size - CHUNK)
                end = size - CHUNK + len(handle.readline(CHUNK))
                rows, more, thinned = [one for _, one in sample(handle, start, end, MOST_ROWS)], True, end - start
            else:
                rows, end, more = _part(handle, start)
    names = chosen(rows)
    return {
        "restart": restart or offset == 0,
        "offset": end,
        "more": more,
        "thinned": thinned,
        "steps": [row["step"] for row in rows],
        "values": {name: [row.get(name) for row in rows] for name in sorted(names)},
        "hidden": sorted(LEFT_OUT & set(names)),
        "saves": _numbers(inside(run) / "checkpoints"),
        "pictures": _numbers(inside(run) / "previews"),
        "phases": _phases(_object(inside(run) / CONFIG)),
        "status": summary(run),
    }


def about(run: Path) -> dict[str, Any]:
    """What a page asks of a run once: its settings by name, and what its previews' contact sheets hold.

    settings: {"training.steps": 280}, numbers, texts and truth values as they are, others as JSON. sheet: `columns`
    pictures in a row, and the prompt of each, "" where it is not known; None where the run says nothing of it.
    """
    files = inside(run)
    config, told = _object(files / CONFIG), _object(files / SHEET)
    training = config.get("training")
    count = training.get("previews", 0) if isinstance(training, dict) else 0
    prompts = told.get("prompts")
    if not isinstance(prompts, list):
        # A run of an earlier version.
        prompts = [""] * min(count, MOST_ON_SHEET) if isinstance(count, int) else []
    prompts = [str(prompt)[:MOST_TEXT] for prompt in prompts[:MOST_ON_SHEET]]
    columns = told.get("columns")
    if not isinstance(columns, int) or not 0 < columns <= len(prompts):
        columns = columns_of(len(prompts)) if prompts else 0
    return {
        "settings": dict(islice(_settings(config), MOST_SETTINGS)),
        "sheet": {"columns": columns, "prompts": prompts} if prompts else None,
    }


def _settings(config: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        path = f"{inside}{name}"[:MOST_TEXT]
        if isinstance(value, dict) and not inside:
            yield from _settings(value, f"{path}.")
        elif value is None or isinstance(value, bool) or _is_number(value):
            yield path, value
        else:
            yield path, (value if isinstance(value, str) else json.dumps(value))[:MOST_TEXT]


def _phases(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parts of a run whose losses are no numbers of one kind: `from`, the first step, and `name`.

    A student that first copies pairs is told by a regression's loss, and from then on by its method's.
    """
    objective = config.get("objective")
    copies = objective.get("regression_steps", 0) if isinstance(objective, dict) else 0
    if not _is_number(copies) or copies <= 0:
        return []
    method = str(config.get("method", ""))[:MOST_TEXT]
    return [{"from": 0, "name": "copies pairs"}, {"from": copies + 1, "name": method}]


def _part(handle: BinaryIO, start: int) -> tuple[list[Row], int, bool]:
    """(rows, where they end, whether there are more) of one answer's worth of a log, from a byte on."""
    handle.seek(start)
    data = handle.read(CHUNK)
    # The line that is being written now is for the next look; one that fills an answer is no row.
    end = data.rfind(b"\n") + 1
    if not end and len(data) == CHUNK:
        end = len(data)
    more = len(data) == CHUNK
    rows = rows_of(data[:end])
    while len(rows) * (1 + len(chosen(rows))) > MOST_NUMBERS:
        # About half as many lines, whatever they hold.
        end, more = data.rfind(b"\n", 0, end // 2) + 1 or data.find(b"\n") + 1, True
        rows = rows_of(data[:end])
    return rows, start + end, more


def _other(handle: BinaryIO, offset: int, step: int) -> bool:
    """Whether the last row before a byte is of another step. Where long lines of no use stand, nobody can tell."""
    before = row_before(handle, offset)
    return before is not None and before["step"] != step


def picture(run: Path, name: str) -> Path:
    """A preview's file. ValueError for a name that is none, FileNotFoundError where it is not there."""
    if not _PICTURE.fullmatch(name):
        raise ValueError(f"{name!r:.80} is no preview's name: they are called step_0000100.png")
    path = inside(run) / "previews" / name
    if not path.is_file():
        raise FileNotFoundError(f"the run {run.name} has no picture {name}")
    return path.path


def command(run: Path, name: str) -> None:
    """Ask a run that goes on to stop, save or sample. ValueError for another command, or a run that has ended."""
    if name not in COMMANDS:
        raise ValueError(f"command {name!r:.40} is not known; use one of {', '.join(COMMANDS)}")
    inside(run).refuse_links()
    status = read_status(run)
    if not status.going:
        raise ValueError(f"the run {run.name} does not go on ({status.state}), so it cannot {name}")
    send(run, name)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _list(values: Any) -> list[float]:
    """The numbers of a file's list."""
    return [value for value in values[:MOST_TIMESTEPS] if _is_number(value)] if isinstance(values, list) else []


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    """What a file says in short texts."""
    texts = {name[:MOST_TEXT]: text[:MOST_TEXT] for name, text in values.items() if isinstance(text, str)}
    return dict(islice(texts.items(), 8))


def _step(path: Inside) -> int:
    """The last step of a log, also where it is a link, which has none."""
    try:
        return last_step(path)
    except (ValueError, OSError):
        return 0


def _numbers(folder: Inside) -> list[int]:
    """The last steps that a folder has a file of."""
    names = folder.files(20 * MOST_FILES)
    return sorted(int(match[1]) for match in map(_NUMBERED.fullmatch, names) if match)[-MOST_FILES:]


def _object(path: Inside) -> Mapping[str, Any]:
    try:
        if not path.is_file():
            return {}
        value = read_json(path)
    except ValueError:
        # A stranger's run, or one that is being written: what is known of it without the file is shown.
        return {}
    return value if isinstance(value, dict) else {}
