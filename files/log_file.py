"""A run's log as a file of lines, one JSON object each: whole, one number of it, thinned, or from a byte on.

The file may be a stranger's, and long: whatever a line holds, a row is a step and finite numbers by name, and what is
no row is passed over, as is a line that is being written, or that a crash cut off.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .folder import Inside, alone

METRICS = "metrics.jsonl"
MOST_NAMES = 64  # different numbers of one log that are looked at
MOST_STEP = 2**53  # what a page's numbers hold
BLOCK = 1 << 20
TAIL = 4096
EXACT = 1 << 21  # bytes up to which a log is looked at whole
Row = dict[str, Any]


def row(line: bytes) -> Row | None:
    """What a line holds, None where it is no row."""
    try:
        return _checked(json.loads(line.decode(errors="replace")))
    except (ValueError, RecursionError):
        return None


def rows_of(data: bytes) -> list[Row]:
    """The rows in whole lines."""
    lines = [line for line in data.split(b"\n") if line.strip()]
    try:
        # Taken apart at once, which is several times as fast.
        values = json.loads(b"[%b]" % b",".join(lines))
        found = [_checked(value) for value in values] if len(values) == len(lines) else [row(line) for line in lines]
    except (ValueError, RecursionError):
        found = [row(line) for line in lines]
    return [one for one in found if one is not None]


def read_rows(path: Path | Inside) -> Iterator[Row]:
    """The rows of a log from the first on; none where there is no log."""
    for block in _blocks(path):
        yield from rows_of(block)


def _blocks(path: Path | Inside) -> Iterator[bytes]:
    """What a log holds, in pieces of whole lines."""
    log = alone(path)
    if not log.is_file():
        return
    with log.open() as handle:
        rest = b""
        while data := handle.read(BLOCK):
            end = data.rfind(b"\n") + 1
            if end:
                yield rest + data[:end]
                rest = data[end:]
            elif len(rest) < BLOCK:  # a longer line is no row, whatever comes
                rest += data
        if rest:
            yield rest


def column(path: Path | Inside, name: str) -> list[float]:
    """A number of every row that has it."""
    number = re.compile(rb'"%b": ?(-?\d[-+.\deE]*)[,}]' % re.escape(json.dumps(name)[1:-1].encode()))
    found: list[float] = []
    for block in _blocks(path):
        plain = _plain(block)
        try:
            values = [float(text) for text in number.findall(block)] if plain else []
        except ValueError:
            plain = False
        if plain and all(map(math.isfinite, values)):
            found += values
        else:
            found += [one[name] for one in rows_of(block) if name in one]
    return found


def _plain(block: bytes) -> bool:
    """Whether lines are as `watch.Metrics` writes them, so that a name in quotation marks is that of a number."""
    lines = block.count(b"\n") + (not block.endswith(b"\n"))
    if b"\\" in block or b"[" in block:
        return False
    return block.count(b'{"step": ') == block.count(b"{") == block.count(b"}") == lines


def thinned(path: Path | Inside, most: int) -> tuple[list[Row], float]:
    """(rows, how many lines of the log one of them stands for): all of a short log, about `most` of a long one.

    Those of a long one lie evenly in the file; the first and the last are among them.
    """
    log = alone(path)
    if not log.is_file():
        return [], 1.0
    with log.open() as handle:
        size = handle.seek(0, io.SEEK_END)
        if size <= EXACT:
            return list(read_rows(path)), 1.0
        found = sample(handle, 0, size, most)
    used = sum(len(line) for line, _ in found) / max(1, len(found))
    return [one for _, one in found], max(1.0, size / used / len(found)) if found else 1.0


def sample(handle: BinaryIO, begin: int, end: int, most: int) -> list[tuple[bytes, Row]]:
    """(line, row) of at most `most` + 2 lines between two places in a log, evenly from the first to the last.

    begin: where a line begins. The work depends on `most` alone.
    """
    found: list[tuple[bytes, Row]] = []
    last = begin - 1
    for number in range(most + 1):
        place = begin + (end - begin) * number // (most + 1)
        handle.seek(place)
        if number:
            place += len(handle.readline(TAIL))  # the rest of some line
        line = handle.readline(TAIL)
        if last < place and place + len(line) <= end and line.endswith(b"\n"):
            last = place
            one = row(line)
            if one is not None:
                found.append((line, one))
    final = row_before(handle, end)
    if final is not None and (not found or final != found[-1][1]):
        found.append((b"", final) if not found else (found[-1][0], final))
    return found


def row_before(handle: BinaryIO, end: int) -> Row | None:
    """The last row whose line ends at or before a byte, None where the last few kilobytes hold none."""
    start = max(0, end - TAIL)
    handle.seek(start)
    lines = handle.read(end - start).split(b"\n")[:-1]
    return next((one for one in map(row, reversed(lines[1 if start else 0 :])) if one is not None), None)


def last_step(path: Path | Inside) -> int:
    """The last step in a log, 0 where there is none."""
    log = alone(path)
    if not log.is_file():
        return 0
    with log.open() as handle:
        found = row_before(handle, handle.seek(0, io.SEEK_END))
    return 0 if found is None else found["step"]


def end_of(handle: BinaryIO, done: int) -> int:
    """Where the lines of the first `done` steps end: what comes after is of a lost attempt, or was cut off.

    It is looked for from the end, since few lines are lost.
    """
    end = handle.seek(0, io.SEEK_END) if done > 0 else 0
    rest = b""  # of a line that begins before `end`
    while end:
        start = max(0, end - BLOCK)
        handle.seek(start)
        data = handle.read(end - start) + rest
        first = data.find(b"\n") + 1 if start else 0
        place = data.rfind(b"\n") + 1
        while place > first:
            begin = data.rfind(b"\n", 0, place - 1) + 1
            one = row(data[begin:place])
            if one is not None and one["step"] <= done:
                return start + place
            place = begin
        rest = data[:first] if first else data
        if len(rest) > 2 * BLOCK:  # no row, whatever comes
            rest = rest[-1:]
        end = start
    return 0


def chosen(rows: Iterable[Row]) -> list[str]:
    """Names of the numbers in rows, in the order of their coming, `MOST_NAMES` at most."""
    names: dict[str, None] = {}
    for one in rows:
        for name in one:
            if name != "step" and name not in names and len(names) < MOST_NAMES:
                names[name] = None
    return list(names)


def _checked(value: Any) -> Row | None:
    if not isinstance(value, dict):
        return None
    step = value.get("step")
    if type(step) is not int or not 0 <= step < MOST_STEP:
        return None
    return {name: number for name, number in value.items() if _is_number(number)}


def _is_number(value: Any) -> bool:
    if type(value) is float:
        return math.isfinite(value)
    return type(value) is int and -MOST_STEP < value < MOST_STEP
