"""Every preset there is: Retort's own and the user's, one JSON file each in models/retort/presets.

A file has the form of `sampling.students.form`; its name is the preset's key. It is a stranger's: whatever is wrong
with it is one warning in the log, and it is left out. What a file says is read again when it has changed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from ..files.paths import files_below
from ..files.strangers import parse, plain
from ..sampling.presets import PRESETS, Preset
from ..sampling.students.form import from_json

# Below models, and how ComfyUI's lists of folders call it.
FOLDER, KIND = "retort/presets", "retort_presets"
MOST_BYTES = 1 << 16
MOST_FILES = 500
AUTO = "auto"
_log = logging.getLogger("retort")


def known(folders: Sequence[Path]) -> dict[str, Preset]:
    """Retort's presets and then those of the user's folders, by key; of two files of one name the first counts."""
    found = dict(PRESETS)
    for path in _files(folders):
        try:
            stat = path.stat()
        except OSError:
            continue  # gone since it was listed
        preset = _read(path, stat.st_mtime_ns, stat.st_size)
        if preset is not None:
            found.setdefault(preset.key, preset)
    return found


def named(key: str | Preset, folders: Sequence[Path]) -> Preset:
    """The preset of a key, or the preset itself; ValueError where there is none."""
    if isinstance(key, Preset):
        return key
    every = known(folders)
    if key not in every:
        raise ValueError(
            f"preset {key!r:.80} is not known: put {key:.60}.json into models/{FOLDER}, or choose one of "
            f"{', '.join(list(every)[:8])} and others"
        )
    return every[key]


def fingerprint(key: object, folders: Sequence[Path]) -> str:
    """A text that is another one once a choice means something else: a preset of the user's by what its file says,
    `auto`, and what is not known yet, by all of these. What Retort brings does not change."""
    if key in PRESETS:
        return ""
    every = known(folders)
    meant = [preset for preset in every.values() if preset.key not in PRESETS and key in (preset.key, AUTO, None)]
    return hashlib.sha256(repr(meant).encode()).hexdigest()


def _files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        for name in files_below([folder], (".json",), deep=False)[:MOST_FILES]:
            yield folder / name


@lru_cache(maxsize=4 * MOST_FILES)
def _read(path: Path, changed: int, size: int) -> Preset | None:
    """A user's preset; None for a file that is none, of which a warning says why, once until it changes."""
    try:
        if path.stem in PRESETS or path.stem == AUTO:
            raise ValueError(f"Retort has a preset {path.stem!r} of its own: rename the file")
        with path.open("rb") as file:
            return from_json(parse(file.read(MOST_BYTES + 1), MOST_BYTES), path.stem)
    except (OSError, ValueError) as error:
        _log.warning("%s is left out: %s", path, plain(str(error)))
        return None
