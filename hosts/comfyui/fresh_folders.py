"""Core's loaders of folders read their folder again when something in it has changed.

ComfyUI keeps what a node gave as long as its inputs are the same, and these have the folder's name alone: a picture
that was taken out, or a caption that was edited, reached no training before ComfyUI was started again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from comfy_api.latest import io

LOADERS = tuple(f"Load{kind}DataSetFromFolder" for kind in ("Image", "ImageText", "Video", "VideoText"))


def watch(nodes: Mapping[str, Any], inputs: Callable[[], Path]) -> None:
    """Let those of `nodes` that say nothing of their own about it be executed again. inputs: gives the input folder."""

    def changed(cls: type, folder: Any = None, **given: Any) -> str:
        return stamp(inputs(), folder)

    nothing = getattr(io.ComfyNode.fingerprint_inputs, "__func__", None)
    for node in (nodes[name] for name in LOADERS if name in nodes):
        if nothing is not None and getattr(getattr(node, "fingerprint_inputs", None), "__func__", None) is nothing:
            node.fingerprint_inputs = classmethod(changed)


def stamp(inputs: Path, folder: Any) -> str:
    """What changes with the files of a folder and of the folders in it; "" where there is none within `inputs`."""
    if not isinstance(folder, str) or Path(folder).is_absolute() or ".." in Path(folder).parts:
        return ""
    found = hashlib.blake2b(digest_size=16)
    try:
        for name, size, time in sorted(_files(inputs / folder, deeper=True)):
            found.update(f"{name}\0{size}\0{time}\0".encode(errors="surrogateescape"))
    except (OSError, ValueError):
        return ""
    return found.hexdigest()


def _files(folder: Path, deeper: bool) -> Iterator[tuple[str, int, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_dir():
                    inner = _files(Path(entry), False) if deeper else ()
                    yield from [(f"{entry.name}/{name}", size, time) for name, size, time in inner]
                    continue
                told = entry.stat()
            except OSError:
                # A dead link, or a folder that may not be read: the others count all the same.
                yield entry.name, -1, -1
                continue
            yield entry.name, told.st_size, told.st_mtime_ns
