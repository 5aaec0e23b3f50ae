"""What a page sees of preference sets: which there are, what one holds, and its latest judgements.

All names come from whoever sent the request. `sets` is the folder of sets.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from itertools import islice
from pathlib import Path
from typing import Any

from ..files.atomic import checked_name
from ..files.entries import LinkError
from ..files.folder import inside
from ..preferences.store import BLIND, BOOKS, PAIRS, Preferences, is_latent, read
from .patience import soon

MOST_SETS, LATEST = 200, 12
COUNTING = 0.1  # seconds of a list in which sets that have grown are read
MOST_TEXT, MOST_STATISTICS = 2000, 20_000  # characters


def every(sets: Path) -> list[dict[str, Any]]:
    """The sets, those that grew last first: name, `when` (seconds since 1970) and what `_count` says."""
    found: list[dict[str, Any]] = []
    for name in inside(sets).folders():
        try:
            when = (inside(sets) / name / PAIRS).changed()
        except LinkError:
            when = 1  # whoever opens it is told
        if when:
            found.append({"name": name, "when": when / 1e9})
    found = sorted(found, key=lambda one: -one["when"])[:MOST_SETS]
    until = time.monotonic() + COUNTING
    for entry in found:
        entry.update(_count(sets / entry["name"], entry["when"], time.monotonic() < until))
    return found


_counts: OrderedDict[Path, tuple[float, dict[str, Any]]] = OrderedDict()


def _count(folder: Path, when: float, may_read: bool) -> dict[str, Any]:
    """How many pairs were `judged` in a set and whether they are a `blind` test's; what was known before, or nothing,
    where it may not be read now, is still being read, or cannot be read."""
    before = _counts.get(folder)
    if (before is None or before[0] != when) and may_read:
        try:
            pairs = soon(("count", folder), f"the set {folder.name}", lambda: read(folder)).pairs
        except (BlockingIOError, OSError, ValueError):
            return before[1] if before else {}
        before = when, {"judged": len(pairs), "blind": all(pair.by.startswith(BLIND) for pair in pairs)}
        _counts[folder] = before
        while len(_counts) > 2 * MOST_SETS:
            _counts.popitem(last=False)
    return before[1] if before else {}


def one(sets: Path, name: str) -> dict[str, Any]:
    """A set's statistics as text, how many lines of its file cannot be used, and its latest pairs of pictures.

    Of a large set that has grown, what was known before is told until it is read. ValueError for a name that leads
    elsewhere, FileNotFoundError where there is no such set, BlockingIOError while a large one is read.
    """
    folder = sets / checked_name(name)
    if folder.is_symlink() or not (inside(folder) / PAIRS).is_file():
        raise FileNotFoundError(f"there is no set called {name!r:.140}")
    try:
        return soon(("set", folder), f"the set {name}", lambda: _told(folder))
    except BlockingIOError:
        if folder in _known:
            return _known[folder][1]
        raise


_known: OrderedDict[Path, tuple[Preferences, dict[str, Any]]] = OrderedDict()


def _told(folder: Path) -> dict[str, Any]:
    found = read(folder)
    before = _known.get(folder)
    if before is None or before[0] is not found:
        before = found, _seen(found)
        _known[folder] = before
        while len(_known) > BOOKS:
            _known.popitem(last=False)
    return before[1]


def _seen(found: Preferences) -> dict[str, Any]:
    pictures = (pair for pair in reversed(found.pairs) if not is_latent(pair.winner) and not is_latent(pair.loser))
    latest = [
        {
            "prompt": pair.prompt[:MOST_TEXT], "winner": Path(pair.winner).stem, "loser": Path(pair.loser).stem,
            "tie": pair.strength == 0, "by": pair.by,
        }
        for pair in islice(pictures, LATEST)
    ]  # fmt: skip
    text = found.statistics()
    return {"statistics": text[:MOST_STATISTICS], "problems": len(found.problems), "latest": latest}
