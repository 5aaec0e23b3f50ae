"""Files of lines that others append to, and what was made of them, read on from where the last look ended.

What is kept is in memory alone, since nothing is written where somebody only looks. A file that is another one by now
is read anew: one that is shorter, or as long and written since, or whose bytes before the place where the last look
ended are others. Of a file that has grown, the first and the last quarter of a megabyte of them are compared.
"""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Generic, Protocol, TypeVar

from .entries import LinkError
from .folder import Inside

BLOCK = 1 << 18
READ = 1 << 20
SETTLED = 100_000_000  # nanoseconds


class Growing:
    """A file's lines, each told once. line_bytes, most: longer lines are told as None, further ones not at all."""

    def __init__(self, path: Inside, line_bytes: int, most: int):
        self.path, self._line_bytes, self._most = path, line_bytes, most
        self.forget()

    def forget(self) -> None:
        """Begin anew."""
        self._stamp: tuple[int, ...] | None = None
        self._marks: tuple[int, int] = (0, 0)
        self._end = self._number = 0
        self.unfinished: int | None = None  # the number of the last line, while it has no end

    def moved(self) -> bool:
        """Whether the file is another one than was read so far, so that all is to be forgotten."""
        found = self.path.stat()
        if found is None:
            return self._end > 0 or self.unfinished is not None
        stamp = _stamp(found)
        if self._stamp is None or stamp == self._stamp:
            return False
        if stamp[0] != self._stamp[0] or found.st_size <= self._stamp[1]:
            return True
        with self.path.open() as handle:
            return self._mark(handle) != self._marks

    def lines(self) -> Iterator[tuple[int, bytes | None]]:
        """(number, line) of what has come since the last look, blank lines left out."""
        if self.path.stat() is None:
            return
        with self.path.open() as handle:
            stamp = _stamp(os.fstat(handle.fileno()))
            if stamp == self._stamp:
                return
            handle.seek(self._end)
            parts: list[bytes] = []
            length, self.unfinished = 0, None
            # No further than the stamp says: what comes meanwhile is for the next look.
            left = stamp[1] - self._end
            while left > 0 and (data := handle.read(min(READ, left))):
                left -= len(data)
                *whole, last = data.split(b"\n")
                for piece in whole:
                    length += len(piece)
                    line = b"".join((*parts, piece)) if length <= self._line_bytes else None
                    self._end += length + 1
                    parts, length = [], 0
                    if self._number < self._most:
                        self._number += 1
                        if line is None or line.strip():
                            yield self._number, line
                length += len(last)
                if length <= self._line_bytes:
                    parts.append(last)
            blank = length <= self._line_bytes and not b"".join(parts).strip()
            if not blank and self._number < self._most:
                self.unfinished = self._number + 1
            self._stamp, self._marks = stamp, self._mark(handle)

    def _mark(self, handle: BinaryIO) -> tuple[int, int]:
        """Of the beginning and of the end of what was read."""
        handle.seek(0)
        first = zlib.crc32(handle.read(min(BLOCK, self._end)))
        handle.seek(max(0, self._end - BLOCK))
        return first, zlib.crc32(handle.read(min(BLOCK, self._end)))


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_ino, found.st_size, found.st_mtime_ns


class Folders:
    """The plain files in some folders of a set, by name, or in the folder itself; looked at again when a folder has
    changed."""

    def __init__(self, folder: Inside, *names: str):
        self._folders = [folder / name for name in names] or [folder]
        self._stamps: list[int] | None = None
        self.there: frozenset[str] = frozenset()

    def look(self) -> bool:
        """Look, and tell whether anything may have changed since the last time."""
        stamps = [_written(folder) for folder in self._folders]
        if stamps == self._stamps:
            return False
        # A clock ticks: of a folder that has just changed, a further change might not be seen.
        self._stamps = stamps if time.time_ns() - max(stamps) > SETTLED else None
        folders = [folder for folder, stamp in zip(self._folders, stamps, strict=True) if stamp]
        self.there = frozenset(f"{folder.name}/{name}" for folder in folders for name in folder.files())
        return True


def _written(folder: Inside) -> int:
    """When a folder was changed; 0 where there is none, or a link, behind which nothing is looked for."""
    try:
        found = folder.stat()
    except LinkError:
        return 0
    return 0 if found is None else found.st_mtime_ns


class Kept(Protocol):
    """What is made of growing files."""

    def refresh(self) -> None:
        """Read on."""
        ...


Made = TypeVar("Made", bound=Kept)


class Shelf(Generic[Made]):
    """The last few things that were made of growing files, each used by one thread at a time."""

    def __init__(self, make: Callable[..., Made], most: int):
        self._make, self._most = make, most
        self._kept: OrderedDict[tuple[Any, ...], tuple[threading.RLock, list[Made]]] = OrderedDict()
        self._lock = threading.Lock()

    @contextmanager
    def take(self, *key: Any) -> Iterator[Made]:
        """The one of a key, made if need be and read on, with nobody else using it."""
        with self._lock:
            lock, made = self._kept.setdefault(key, (threading.RLock(), []))
            self._kept.move_to_end(key)
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)
        with lock:
            try:
                if made:
                    made[0].refresh()
                else:
                    made.append(self._make(*key))
            except BaseException:
                made.clear()
                raise
            yield made[0]
