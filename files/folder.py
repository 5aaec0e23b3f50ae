"""The one place that opens, writes, locks, lists and deletes inside a run's, a set's, a search's or a job's folder.

Such a folder may come from a stranger, in an archive that carries links: a log that is a link to the user's start-up
file would be appended to, a folder of checkpoints that is a link would be tidied up. So no link is followed below the
folder that the user chose, at any depth, whatever is done there; each ends in a `LinkError` that names it. The chosen
folder itself may be a link, or lie behind one: that is the user's own doing. Where the system can, each folder on the
way is opened relative to the one above it and without following links, so that nothing can be exchanged in between;
elsewhere (Windows) each is looked at first. Temporary files have random names and are never opened if they exist.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from . import entries
from .entries import Entry, is_link, kind_of, lock, refuse_link, replace, take

NAME_BYTES = 255  # of one entry, on every file system in use
DEEPEST = 32  # folders in folders; a run has three
NEW = "new"  # what a file is called that has no name yet


class Inside:
    """A file or folder by its names below `root`, the folder that the user chose; made with `/`, as paths are.

    Names come from our own code or have been checked: ValueError for one that leads elsewhere. Whatever meets a link
    raises LinkError.
    """

    def __init__(self, root: Path, *parts: str):
        for part in parts:
            if part in ("", ".", "..") or set("/\\\0") & set(part):
                raise ValueError(f"{part!r:.80} is no name of a file or folder in {root}")
        self.root, self.parts = Path(root), parts

    def __truediv__(self, names: str) -> Inside:
        return Inside(self.root, *self.parts, *names.split("/"))

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Inside({str(self.root)!r}, {', '.join(map(repr, self.parts))})"

    @property
    def path(self) -> Path:
        """For messages, and for `checked`."""
        return self.root.joinpath(*self.parts)

    @property
    def name(self) -> str:
        """The last name."""
        return self.path.name

    @property
    def parent(self) -> Inside:
        """The folder that it is in."""
        return Inside(self.root, *self.parts[:-1])

    # ---- looking ---------------------------------------------------------------------------------

    def stat(self) -> os.stat_result | None:
        """Of the file or folder itself, None where there is none."""
        if not self.parts:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                return os.stat(self.root)
            return None
        try:
            with self._entry() as entry:
                found = entry.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if is_link(found):
            refuse_link(self.path)
        return found

    def is_file(self) -> bool:
        """Whether it is a plain file."""
        found = self.stat()
        return found is not None and stat.S_ISREG(found.st_mode)

    def is_dir(self) -> bool:
        """Whether it is a folder."""
        found = self.stat()
        return found is not None and stat.S_ISDIR(found.st_mode)

    def changed(self) -> int:
        """When the file was written, in nanoseconds; 0 where there is none."""
        found = self.stat()
        return found.st_mtime_ns if found is not None and stat.S_ISREG(found.st_mode) else 0

    def checked(self) -> Path:
        """Its path, for a library that opens files by name. FileNotFoundError unless it is a plain file."""
        if not self.is_file():
            raise FileNotFoundError(errno.ENOENT, "there is no such file", str(self.path))
        return self.path

    def files(self, most: int | None = None) -> list[str]:
        """The names of the plain files in this folder, in order; links are left out. most: entries that are looked at,
        in the order in which they happen to lie."""
        return sorted(name for name, kind in self._scanned(most) if kind == "file")

    def folders(self, linked: bool = False) -> list[str]:
        """The names of the folders in this folder, in order. linked: also of links to folders, where each is one that
        the user chooses; else they are left out."""
        found = self._scanned()
        return sorted(
            name for name, kind in found
            if kind == "folder" or (linked and kind == "link" and (self.path / name).is_dir())
        )  # fmt: skip

    def refuse_links(self) -> None:
        """LinkError for the first link in this folder, at any depth: before anything is done that would meet it."""
        for name, kind in self._scanned():
            if kind == "link":
                refuse_link(self.path / name)
            if kind == "folder":
                if len(self.parts) > DEEPEST:
                    raise ValueError(f"{self} holds folders more than {DEEPEST} deep, which no run or set does")
                (self / name).refuse_links()

    # ---- reading ---------------------------------------------------------------------------------

    def open(self) -> BinaryIO:
        """The file, for reading. OSError where there is none."""
        with self._entry() as entry:
            return open(entry.open(os.O_RDONLY), "rb")

    def read(self, most: int | None = None) -> bytes:
        """What the file holds. OSError where there is none, ValueError where it is larger than `most` bytes."""
        with self.open() as handle:
            data = handle.read() if most is None else handle.read(most + 1)
        if most is not None and len(data) > most:
            raise ValueError(f"{self} is larger than {most} bytes, which no such file is")
        return data

    # ---- writing ---------------------------------------------------------------------------------

    def make(self) -> None:
        """Make this folder, and those above it."""
        with (self / "_")._entry(make=True):
            pass

    @contextlib.contextmanager
    def fresh(self, synced: bool = True) -> Iterator[BinaryIO]:
        """Write the file anew: a reader, also after a crash, finds the old one or the new one, whole.

        Yields a file; when the block ends well, what was written to it takes this name. synced: once it is on the disk.
        OSError names it.
        """
        try:
            with self._entry(make=True) as entry:
                if self.is_dir():
                    raise IsADirectoryError(errno.EISDIR, "a folder has that name")
                part = entry.beside(part_name(self.name))
                # With its path as its name, for a library that writes files by name.
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                try:
                    with open(part.path, "wb", opener=lambda *_: part.open(flags)) as handle:
                        yield handle
                        handle.flush()
                        if synced:
                            os.fsync(handle.fileno())
                    replace(part, entry)
                    if synced:
                        entry.sync_folder()
                except BaseException:
                    with contextlib.suppress(OSError):
                        part.unlink()
                    raise
        except OSError as error:
            if error.filename is not None and not str(error.filename).endswith(".part"):
                raise  # of another file, which was read meanwhile
            raise OSError(
                error.errno, f"cannot write {self}: {error.strerror}; free space or choose another folder"
            ) from error

    def write(self, data: bytes, synced: bool = True) -> None:
        """Write the file whole, as `fresh` does."""
        with self.fresh(synced) as handle:
            handle.write(data)

    def write_first(self, names: Iterable[str], data: bytes, synced: bool = True) -> Inside | None:
        """Write a new file in this folder under the first of the names that nothing has; None when all are taken.

        synced: once it is on the disk.
        """
        made = self / part_name(NEW)
        made.write(data, synced)
        with made._entry() as part:
            try:
                for name in names:
                    if take(part, part.beside(name)):
                        if synced:
                            part.sync_folder()
                        return self / name
            finally:
                with contextlib.suppress(FileNotFoundError):
                    part.unlink()
        return None

    def appending(self) -> BinaryIO:
        """The file, made if it is new, for reading and for writing at its end. OSError names it."""
        with self._entry(make=True) as entry:
            return open(entry.open(os.O_RDWR | os.O_CREAT | os.O_APPEND), "a+b", buffering=0)

    def append(self, lines: Iterable[bytes]) -> None:
        """Append whole lines in one piece, and wait until they are on the disk; the file is made if it is new."""
        with self.appending() as handle:
            end = handle.seek(0, os.SEEK_END)
            # A writer that was killed left half a line.
            torn = bool(end) and (handle.seek(end - 1), handle.read(1))[1] != b"\n"
            data = (b"\n" if torn else b"") + b"".join(lines)
            while data:
                data = data[handle.write(data) :]
            os.fsync(handle.fileno())

    def rename(self, name: str) -> bool:
        """Give the file another name in its folder, unless something has that one; whether it has it now.

        FileNotFoundError where there is no file.
        """
        self.checked()
        with self._entry() as entry:
            if not take(entry, entry.beside((self.parent / name).name)):
                return False
            # A file system without hard links has moved it already.
            with contextlib.suppress(FileNotFoundError):
                entry.unlink()
        return True

    def remove(self) -> bool:
        """Delete the file; whether there was one."""
        found = self.stat()
        if found is None:
            return False
        with self._entry() as entry, contextlib.suppress(FileNotFoundError):
            entry.unlink()
        return True

    def remove_tree(self) -> None:
        """Delete this folder with all that is in it. LinkError, before anything goes, where a link is."""
        self.refuse_links()
        self._remove_tree()

    def _remove_tree(self) -> None:
        for name, kind in self._scanned():
            inner = self / name
            inner._remove_tree() if kind == "folder" else inner.remove()
        with self._entry() as held:
            os.rmdir(held.name, **held.where)

    def forget_parts(self, name: str = "*", older: float = 0.0) -> None:
        """Delete what killed writers left of files of this name in this folder, or of all.

        older: seconds for which nothing may have been written to it; above 0 where others write such files too.
        """
        for found in self.files():
            # With a second dot where such a file was itself being written.
            if found.endswith(".part") and found.startswith("." if name == "*" else (f".{name}.", f"..{name}.")):
                part = self / found
                if not older or part.changed() < (time.time() - older) * 1e9:
                    part.remove()

    # ---- holding ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this file, made if it is new; BlockingIOError when another process does. A crash lets it go."""
        with self.appending() as handle:
            try:
                lock(handle)
            except OSError as error:
                raise BlockingIOError(
                    f"{self.parent} belongs to a run that is still going; wait for it, stop it, or choose another name"
                ) from error
            yield

    def held(self) -> bool:
        """Whether another process holds this file. Makes none."""
        try:
            with self._entry() as entry:
                try:
                    found = entry.open(os.O_RDWR)
                except OSError as error:
                    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                        raise
                    found = entry.open(os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError):
            return False
        with open(found, "rb") as handle:
            try:
                lock(handle)
            except OSError:
                return True
            return False

    # ---- the way there ---------------------------------------------------------------------------

    def _scanned(self, most: int | None = None) -> list[tuple[str, str]]:
        """(name, "file", "folder", "link" or "other") of what is in this folder, nothing where it is none."""
        try:
            with (self / "_")._entry() as entry, os.scandir(entry.folder) as found:
                return [(one.name, kind_of(one)) for one in islice(found, most)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    @contextlib.contextmanager
    def _entry(self, make: bool = False) -> Iterator[Entry]:
        """This name in its folder, which is held open meanwhile; make: with the folders that are missing."""
        if not self.parts:
            raise ValueError(f"{self.root} is the folder itself")
        above, path = self.parts[:-1], self.root
        if make:
            path.mkdir(parents=True, exist_ok=True)
        if not entries.BY_HANDLE:
            for part in above:
                path = path / part
                refuse_link(path)
                if make:
                    path.mkdir(exist_ok=True)
            refuse_link(self.path)
            yield Entry(self.path, None)
            return
        handle = entries.folder_handle(path)
        try:
            for part in above:
                path = path / part
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, dir_fd=handle)
                inner = entries.folder_handle(path, handle)
                os.close(handle)
                handle = inner
            yield Entry(self.path, handle)
        finally:
            os.close(handle)


def inside(folder: Path | Inside) -> Inside:
    """A folder that the user chose, or one inside it."""
    return folder if isinstance(folder, Inside) else Inside(folder)


def alone(path: Path | Inside) -> Inside:
    """A file in a folder that the user chose: links of that folder's own are not followed, those above it are."""
    return path if isinstance(path, Inside) else Inside(path.parent, path.name)


def part_name(name: str) -> str:
    """A temporary name for a file of this name, which nobody can have foreseen."""
    token = f"{secrets.token_hex(8)}.part"
    return f".{name}.{token}" if len(os.fsencode(name)) + len(token) + 2 <= NAME_BYTES else f".{token}"
