"""Files of models by the names that ComfyUI's folders know them by, also as they are written on another system."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...files.paths import FileNames, below, dead_link
from ...trainers import sources


def names(kind: str) -> FileNames:
    """The safetensors files in the folders of a kind."""
    return FileNames(name for name in folder_paths.get_filename_list(kind) if name.lower().endswith(sources.ENDINGS))


def path_of(kind: str, name: str) -> Path:
    """The file of that name, with either separator. ValueError for a name that leaves its folder, for a file that is
    no safetensors, and for one that is not there."""
    sources.checked_path(name, kind)
    roots = [Path(root) for root in folder_paths.get_folder_paths(kind)]
    # A name with a backslash is one name here, and a path for who saved the workflow.
    for root in roots:
        for path in (root / name, below(root, name)):
            if path.is_file():
                return path
    if dead := dead_link(roots, name):
        raise ValueError(f"{kind} file {name!r}: {dead}")
    here = names(kind)
    raise ValueError(
        f"{kind} file {name!r} was not found. Put it into {' or '.join(map(str, roots))} (found there: "
        f"{', '.join(here[:8]) or 'nothing'})"
    )
