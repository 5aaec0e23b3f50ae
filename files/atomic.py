"""Files that are whole or not there: atomic writes, names that are never overwritten, tensors as bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from .folder import NEW, Inside, alone, inside, part_name
from .in_turn import write_in_turn

# What is added to a name (".safetensors", "_export", a number, a temporary ending) must fit into 255 bytes with it.
NAME_BYTES, NAME_LENGTH = 230, 120
ABANDONED = 86400.0  # seconds after which nobody goes on with a file that was begun
TYPES = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
}  # fmt: skip
# Windows opens devices by these names, whatever ending and folder they have.
RESERVED = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", "CLOCK$"} | {
    f"{port}{number}" for port in ("COM", "LPT") for number in "123456789¹²³"
}


def write_atomically(path: Path | Inside, data: bytes) -> None:
    """Write a file so that a reader, also after a crash, finds the old one or the new one. OSError names the file."""
    alone(path).write(data)


def write_json(path: Path | Inside, value: Mapping[str, Any]) -> None:
    """A JSON file, atomically."""
    write_atomically(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def tensors(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file's content; tensors that share memory are written once each."""
    return save(_plain(state), dict(metadata) if metadata else None)


def write_tensors(path: Path | Inside, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file of these tensors, atomically and without a second copy of them. OSError names the file."""
    write_in_turn(path, {name: tensor.dtype for name, tensor in state.items()}, state.__getitem__, metadata)


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in state.items():
        tensor = value.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        plain[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return plain


def refuse_types(state: Mapping[str, Tensor]) -> None:
    """ValueError for tensors of a kind that no file of ours holds, such as float8, with which torch computes little."""
    for name, tensor in state.items():
        if tensor.dtype not in TYPES:
            raise ValueError(f"its tensor {name!r:.80} is of {tensor.dtype}, which no such file of Retort's holds")


def write_new(folder: Path | Inside, name: str, data: bytes) -> Path:
    """Write a file under a name that nothing has yet: name.safetensors, name_2.safetensors, ...; its path.

    ValueError for a name that would leave the folder.
    """
    stem = checked_name(name)
    inside(folder).forget_parts(NEW, older=ABANDONED)
    names = (f"{stem}.safetensors" if number == 1 else f"{stem}_{number}.safetensors" for number in range(1, 100_000))
    made = inside(folder).write_first(names, data)
    if made is None:
        raise ValueError(f"{folder} holds a hundred thousand files called {stem}; choose another name")
    return made.path


def check_writable(folder: Path) -> None:
    """Try whether files can be written to a folder, made or yet to be made; OSError names it. Leaves nothing."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    trial = inside(there) / part_name("trial")
    try:
        trial.write(b"retort")
        trial.remove()
    except OSError as error:
        why = error.__cause__ if isinstance(error.__cause__, OSError) else error
        raise OSError(
            error.errno, f"cannot write to {folder}: {why.strerror}; free space, or get the right to write there"
        ) from error


def checked_name(name: str) -> str:
    """A name for a file or folder, without its ending. ValueError for one that is empty, too long for a file system
    (which counts bytes), reserved by Windows, or that leads elsewhere."""
    stem = name.removesuffix(".safetensors").strip()
    bad = set('/\\:*?"<>|\0') & set(stem)
    if not stem or stem.startswith(".") or bad or not stem.isprintable() or stem.endswith("."):
        raise ValueError(f"name {name!r:.140} cannot be a file's name: use letters, digits, spaces, - and _")
    if len(stem) > NAME_LENGTH or len(stem.encode()) > NAME_BYTES:
        raise ValueError(
            f"name {name!r:.40}... cannot be a file's name: it is longer than {NAME_LENGTH} characters or {NAME_BYTES} "
            "bytes; shorten it"
        )
    if stem.split(".")[0].rstrip().upper() in RESERVED:
        raise ValueError(f"name {name!r} cannot be a file's name: Windows keeps it for a device; add a letter")
    return stem


def locked(folder: Path | Inside, name: str = "lock") -> AbstractContextManager[None]:
    """Hold a run's folder; BlockingIOError when another run has it. A crash lets it go."""
    return (inside(folder) / name).locked()
