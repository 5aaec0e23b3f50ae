"""Published students by the names of their files."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from .preset import Preset


def matching(presets: Iterable[Preset], file: str) -> list[Preset]:
    """The presets that a file's name is of, folders and capitals aside: those with the pattern that says most of it.

    More than one where patterns of several presets say equally much; none where no pattern fits.
    """
    name = file.replace("\\", "/").rpartition("/")[2].lower()
    stem = name.rpartition(".")[0] or name
    scored: dict[str, tuple[int, Preset]] = {}
    for preset in presets:
        fits = [p for p in preset.files if fnmatchcase(stem, p.lower()) or fnmatchcase(name, p.lower())]
        if fits:
            scored[preset.key] = max(len(p) - p.count("*") - p.count("?") for p in fits), preset
    most = max((score for score, _ in scored.values()), default=0)
    return [preset for score, preset in scored.values() if score == most]
