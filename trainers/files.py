"""Files that are whole or not there: atomic writes, names that are never overwritten, a lock on a run's folder."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, also after a crash, finds the old one or the new one. OSError names the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process's number: two runs that aim at one file must not share the temporary one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"cannot write {path}: {error.strerror}; free space or choose another folder"
        ) from error


def append_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Append whole lines to a file, made if it is new, in one piece, and wait until they are on the disk."""
    with open(path, "a+b", buffering=0) as handle:
        end = handle.seek(0, os.SEEK_END)
        # A writer that was killed left half a line.
        torn = bool(end) and (handle.seek(end - 1), handle.read(1))[1] != b"\n"
        data = (b"\n" if torn else b"") + b"".join(lines)
        while data:
            data = data[handle.write(data) :]
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":  # a folder cannot be opened there; NTFS journals the rename itself
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def forget_parts(folder: Path, name: str = "*") -> None:
    """Remove what killed writers left of files of this name here. Only for files that the caller alone writes."""
    for part in folder.glob(f".{name}.*.part"):
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file, atomically."""
    write_atomically(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def tensors(state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file's content; tensors that share memory are written once each."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in state.items():
        tensor = value.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        plain[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return save(plain, dict(metadata) if metadata else None)


def write_new(folder: Path, name: str, data: bytes) -> Path:
    """Write a file under a name that nothing has yet: name.safetensors, name_2.safetensors, ...; its path.

    ValueError for a name that would leave the folder.
    """
    stem = checked_name(name)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{stem}.{os.getpid()}.part"
    write_atomically(temporary, data)
    try:
        for number in range(1, 100_000):
            path = folder / (f"{stem}.safetensors" if number == 1 else f"{stem}_{number}.safetensors")
            if _take(temporary, path):
                _sync_folder(folder)
                return path
    finally:
        temporary.unlink(missing_ok=True)
    raise ValueError(f"{folder} holds a hundred thousand files called {stem}; choose another name")


def _take(temporary: Path, path: Path) -> bool:
    """Give a written file its name unless another has it; two processes never both succeed."""
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    except OSError:  # file systems without hard links
        if path.exists():
            return False
        os.rename(temporary, path) if sys.platform == "win32" else os.replace(temporary, path)
        return True


def check_writable(folder: Path) -> None:
    """Try whether files can be written to a folder, made or yet to be made; OSError names it. Leaves nothing."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    trial = there / f".{os.getpid()}.trial"
    try:
        trial.write_bytes(b"retort")
        trial.unlink()
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write to {folder}: {error.strerror}; free space, or get the right to write there"
        ) from error


def checked_name(name: str) -> str:
    """A name for a file or folder, without its ending. ValueError for one that is empty or leads elsewhere."""
    stem = name.removesuffix(".safetensors").strip()
    bad = set('/\\:*?"<>|\0') & set(stem)
    if not stem or stem.startswith(".") or bad or len(stem) > 120 or not stem.isprintable() or stem.endswith("."):
        raise ValueError(f"name {name!r:.140} cannot be a file's name: use letters, digits, spaces, - and _")
    return stem


@contextlib.contextmanager
def locked(folder: Path, name: str = "lock") -> Iterator[None]:
    """Hold a run's folder; BlockingIOError when another run has it. A crash lets it go."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "a+b") as handle:
        try:
            _lock(handle)
        except OSError as error:
            raise BlockingIOError(
                f"{folder} belongs to a run that is still going; wait for it, stop it, or choose another name"
            ) from error
        yield


if sys.platform == "win32":
    import msvcrt

    def _lock(handle) -> None:
        handle.seek(0)
        msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(handle) -> None:
        fcntl.flock(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
