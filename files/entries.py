"""Single entries of a folder, opened, replaced and deleted without following a link; what `folder` is made of."""

from __future__ import annotations

import errno
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_PLAIN = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOINHERIT", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
# A pipe must not be waited for.
_AT_ONCE = getattr(os, "O_NONBLOCK", 0)
BY_HANDLE = bool(_NO_LINK) and {os.open, os.stat, os.unlink, os.mkdir, os.rmdir} <= os.supports_dir_fd


class LinkError(ValueError):
    """There is a link where only files and folders of the chosen folder's own may be."""


@dataclass(frozen=True)
class Entry:
    """A name in a folder that is held open (handle), or its whole path where folders cannot be."""

    path: Path
    handle: int | None

    @property
    def folder(self) -> int | Path:
        """The folder, for a system call."""
        return self.path.parent if self.handle is None else self.handle

    @property
    def name(self) -> str | Path:
        """The name for a system call that is told `where`."""
        return self.path if self.handle is None else self.path.name

    @property
    def where(self) -> dict[str, Any]:
        """The keyword that names the folder to a system call."""
        return {} if self.handle is None else {"dir_fd": self.handle}

    def beside(self, name: str) -> Entry:
        """Another name in the same folder."""
        return Entry(self.path.with_name(name), self.handle)

    def stat(self) -> os.stat_result:
        """Of the entry itself, also where it is a link."""
        return os.stat(self.name, follow_symlinks=False, **self.where)

    def open(self, flags: int) -> int:
        """A descriptor of a plain file. LinkError for a link, OSError with the whole path for what is none."""
        if self.handle is None:
            refuse_link(self.path)
        try:
            found = os.open(self.name, flags | _PLAIN | _NO_LINK | _AT_ONCE, 0o666, **self.where)
        except OSError as error:
            refuse_link(self.path)
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        if not stat.S_ISREG(os.fstat(found).st_mode):
            os.close(found)
            raise OSError(errno.EINVAL, "it is no plain file", str(self.path))
        return found

    def unlink(self) -> None:
        """Delete it, not what it may link to."""
        os.unlink(self.name, **self.where)

    def sync_folder(self) -> None:
        """Wait until the folder's names are on the disk."""
        if self.handle is not None:  # Windows journals the rename itself
            os.fsync(self.handle)


def folder_handle(path: Path, above: int | None = None) -> int:
    """A descriptor of a folder: of the chosen one, however it is found, or, above: of the folder that it lies in, of
    one that is no link."""
    flags = os.O_RDONLY | os.O_DIRECTORY | _PLAIN
    if above is None:
        return os.open(path, flags)
    try:
        return os.open(path.name, flags | _NO_LINK, dir_fd=above)
    except OSError as error:
        refuse_link(path)
        raise OSError(error.errno, error.strerror, str(path)) from None


def is_link(found: os.stat_result) -> bool:
    """Whether what was looked at leads elsewhere."""
    if stat.S_ISLNK(found.st_mode):
        return True
    # A junction, which Windows follows as it does a link. Other reparse points are files that lie in a cloud.
    return getattr(found, "st_reparse_tag", 0) == getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", -1)


def kind_of(entry: os.DirEntry[str]) -> str:
    """One of "file", "folder", "link" or "other"."""
    if entry.is_symlink() or (sys.platform == "win32" and is_link(entry.stat(follow_symlinks=False))):
        return "link"
    if entry.is_dir(follow_symlinks=False):
        return "folder"
    return "file" if entry.is_file(follow_symlinks=False) else "other"


def refuse_link(path: Path) -> None:
    """LinkError where there is a link."""
    try:
        if not is_link(os.lstat(path)):
            return
        target = os.readlink(path)
    except OSError:
        return
    raise LinkError(
        f"{path} is a link to {target!r:.200}, and no link in such a folder is followed: put the file or folder itself "
        "there"
    )


def replace(old: Entry, new: Entry) -> None:
    """Give a file of the same folder another's name."""
    if old.handle is None:
        os.replace(old.path, new.path)
    else:
        os.replace(old.name, new.name, src_dir_fd=old.handle, dst_dir_fd=new.handle)


def take(part: Entry, new: Entry) -> bool:
    """Give a written file its name unless another has it; two processes never both succeed."""
    try:
        if part.handle is None:
            os.link(part.path, new.path)
        else:
            os.link(part.name, new.name, src_dir_fd=part.handle, dst_dir_fd=new.handle, follow_symlinks=False)
        return True
    except FileExistsError:
        return False
    except OSError:  # file systems without hard links: there the name is empty until the file has it
        try:
            os.close(new.open(os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        except (FileExistsError, LinkError):
            return False
        try:
            replace(part, new)
        except OSError:
            new.unlink()
            raise
        return True


if sys.platform == "win32":
    import msvcrt

    def lock(handle: BinaryIO) -> None:
        """Hold an open file; OSError when another does."""
        handle.seek(0)
        msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def lock(handle: BinaryIO) -> None:
        """Hold an open file; OSError when another does."""
        fcntl.flock(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
