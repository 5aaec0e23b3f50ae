"""Further folders of models, as ComfyUI's extra_model_paths.yaml names them.

Each section may have a `base_path` (with ~ and environment variables; a relative one begins at the file) and
`is_default`; its other entries are a kind of models and one folder or several, in lines. What cannot be a folder of
models, such as `custom_nodes`, is kept like the rest: nobody asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...files.errors import UsageError

# ComfyUI's name of the file, and its name of the option that gives another.
NAME, OPTION = "extra_model_paths.yaml", "--extra-model-paths-config"
MOST_BYTES = 1 << 20
# Kinds by the names that they had before.
_LEGACY = {"unet": "diffusion_models", "clip": "text_encoders"}


@dataclass(frozen=True)
class Extra:
    """A folder of a kind of models. first: it is searched, and written to, before those named so far. source: the file
    that names it."""

    kind: str
    path: Path
    first: bool
    source: Path


def files(models: Iterable[Path], configs: Iterable[Path]) -> list[Path]:
    """The files to read: those beside folders of models, where they are, then those that were named."""
    beside = [Path(os.path.abspath(root)).parent / NAME for root in models]
    return list(dict.fromkeys([path for path in beside if os.path.isfile(path)] + list(configs)))


def read_all(models: Iterable[Path], configs: Iterable[Path]) -> list[Extra]:
    """The folders of all `files`. UsageError for one that cannot be read."""
    return [extra for path in files(models, configs) for extra in read(path)]


def read(path: Path) -> tuple[Extra, ...]:
    """The folders that one file names, in its order. UsageError for one that cannot be read."""
    try:
        found = path.stat()
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): give ComfyUI's {NAME}") from error
    return _read(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=16)
def _read(path: Path, written: int, size: int) -> tuple[Extra, ...]:
    try:
        import yaml
    except ImportError as error:
        raise UsageError(f'{path} needs PyYAML, which comes with pip install "retort[headless]"') from error
    try:
        if size > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES} bytes")
        sections = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        if sections is None:  # comments alone, as the example comes
            return ()
        if not isinstance(sections, dict):
            raise ValueError("it has no sections")
        return tuple(extra for name, section in sections.items() for extra in _section(path, name, section))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())[:300]
        raise UsageError(f"{path} cannot be read as ComfyUI's {NAME} ({why}): mend or remove it") from error


def _section(source: Path, name: Any, section: Any) -> list[Extra]:
    if section is None:
        return []
    if not isinstance(section, dict):
        raise ValueError(f"section {name!r} has no kinds of models")
    entries = dict(section)
    here, base = os.path.dirname(os.path.abspath(source)), entries.pop("base_path", None)
    start, first = here, bool(entries.pop("is_default", False))
    if base is not None:
        start = os.path.join(here, os.path.expandvars(os.path.expanduser(_text(base, f"base_path of {name!r}"))))
    return [
        Extra(_LEGACY.get(str(kind), str(kind)), Path(os.path.normpath(os.path.join(start, line))), first, source)
        for kind, lines in entries.items()
        for line in _text(lines, f"{kind!r} of {name!r}").split("\n")
        if line
    ]


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {value!r:.60} and no folder")
    return value
