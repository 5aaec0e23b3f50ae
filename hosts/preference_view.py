"""What a page sees of preference sets: which there are, what one holds, and its latest judgements.

All names come from whoever sent the request. `sets` is the folder of sets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..trainers.entries import LinkError
from ..trainers.files import checked_name
from ..trainers.folder import inside
from ..trainers.preferences import PAIRS, is_latent, read

MOST_SETS, LATEST = 200, 12


def every(sets: Path) -> list[dict[str, Any]]:
    """The sets, those that grew last first: name and `when` (seconds since 1970)."""
    found = []
    for name in inside(sets).folders():
        try:
            when = (inside(sets) / name / PAIRS).changed()
        except LinkError:
            when = 1  # whoever opens it is told
        if when:
            found.append({"name": name, "when": when / 1e9})
    return sorted(found, key=lambda one: -one["when"])[:MOST_SETS]


def one(sets: Path, name: str) -> dict[str, Any]:
    """A set's statistics as text, how many lines of its file cannot be used, and its latest pairs of pictures.

    ValueError for a name that leads elsewhere, FileNotFoundError where there is no such set.
    """
    folder = sets / checked_name(name)
    if folder.is_symlink() or not (inside(folder) / PAIRS).is_file():
        raise FileNotFoundError(f"there is no set called {name!r:.140}")
    found = read(folder)
    pictures = [pair for pair in found.pairs if not is_latent(pair.winner) and not is_latent(pair.loser)]
    latest = [
        {
            "prompt": pair.prompt, "winner": Path(pair.winner).stem, "loser": Path(pair.loser).stem,
            "tie": pair.strength == 0, "by": pair.by,
        }
        for pair in pictures[: -LATEST - 1 : -1]
    ]  # fmt: skip
    return {"statistics": found.statistics(), "problems": len(found.problems), "latest": latest}
