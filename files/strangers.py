"""Texts from strangers: JSON within bounds, and what of a text may be shown."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from . import texts
from .folder import Inside, alone

MOST_BYTES = 1_000_000
DEEPEST = 32  # lists in lists; our own files have four
# What a terminal takes as an order rather than a text: colours, titles, the clipboard, the cursor.
_ORDERS = re.compile(
    "\x1b\\][^\x07\x1b\x9c]*(?:\x07|\x1b\\\\|\x9c)?"  # OSC, up to its end
    "|\x1b[PX^_][^\x1b\x9c]*(?:\x1b\\\\|\x9c)?"  # DCS, SOS, PM, APC
    "|(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]"  # CSI
    "|\x1b[ -/]*[0-~]"
)
# Other control characters, marks that turn the order of writing round, and halves of characters, which cannot be sent.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")


def plain(text: str) -> str:
    """A text as it may be shown: without orders to a terminal; what else cannot be seen is spelled, as \\x07 is."""
    text = _ORDERS.sub("", text.replace("\r\n", "\n"))
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def read_json(path: Path | Inside, most: int = MOST_BYTES, finite: bool = True) -> Any:
    """A JSON file's value, as `parse` reads it. ValueError names the file and what is wrong with it."""
    try:
        with alone(path).open() as handle:
            data = handle.read(most + 1)
    except OSError as error:
        raise ValueError(f"{path}: it cannot be read: {error.strerror}") from error
    try:
        return parse(data, most, finite)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse(data: bytes, most: int = MOST_BYTES, finite: bool = True) -> Any:
    """Strict JSON: no NaN, no repeated names, no number beyond 64 bits, no half characters; of bounded size and depth.

    finite: false lets infinite numbers and NaN pass, which our own files hold here and there. ValueError says what is
    wrong.
    """
    if len(data) > most:
        raise ValueError(f"it is larger than {most} bytes, which no such file is")
    try:
        value = json.loads(
            texts.decode(data),
            parse_int=_whole,
            parse_float=_number if finite else None,
            parse_constant=_constant if finite else None,
            object_pairs_hook=_unique,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    _check_depth(data, value)
    _check_halves(data, value)
    return value


def parse_line(line: bytes, most: int) -> Any:
    """As `parse`, with infinite numbers; fast for an object of texts and numbers, as the lines of a long file are."""
    if len(line) <= most and b"\\u" not in line:
        try:
            value = json.loads(line.decode())
        except (ValueError, RecursionError):
            value = None
        # A name that was given twice has left one behind.
        simple = isinstance(value, dict) and line.count(b'":') == len(value)
        if simple and all(type(v) in _SIMPLE or (type(v) is int and abs(v) < 2**63) for v in value.values()):
            return value
    return parse(line, most, finite=False)


_SIMPLE = frozenset((str, float, bool, type(None)))


def _check_depth(data: bytes, value: Any) -> None:
    if data.count(b"[") + data.count(b"{") <= DEEPEST:
        return
    level = [value]
    for _ in range(DEEPEST):
        each = (inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer))
        level = [inner for inner in each if isinstance(inner, dict | list)]
    if level:
        raise ValueError("it is nested too deep")


def _check_halves(data: bytes, value: Any) -> None:
    if not _HALF.search(data):
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("it holds half a character (a lone surrogate)") from error


def _whole(text: str) -> int:
    if len(text) > 20 or abs(int(text)) >= 2**64:
        raise ValueError(f"the number {text:.24}... is too large")
    return int(text)


def _number(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"the number {text:.24} is too large")
    return float(text)


def _constant(text: str) -> float:
    raise ValueError(f"{text} is no number that a setting can have")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key:.80} is given twice")
        found[key] = value
    return found
