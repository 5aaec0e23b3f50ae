"""Names from a workflow turned into paths that cannot leave the folder they belong to, and what such a folder holds.

Two rules. Where files are read from a folder that its owner fills, such as the folders of models, links in it are
followed, since people keep large files on another disk (`below`, `walked`). Where files are written, and where an
archive of a stranger may have been unpacked, a link that leads out of the folder is refused (`inside`, and
`files.folder`, which follows none at all). A name leaves its folder in neither.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from .errors import UsageError

# Of one folder below a root: it may be linked to from several places, and links may lead in a circle.
MOST_WAYS, DEEPEST = 8, 32


class PathError(UsageError):
    """A name that does not stay inside its folder."""


class FileNames(list[str]):
    """The names of files that a user may choose from.

    A name is among them with either separator, / or \\, and with its accents as either system writes them: macOS
    stores some as characters of their own.
    """

    def spelt(self, name: object) -> str | None:
        """A name as it is spelt here, None where it is not among them. Upper and lower case are two names."""
        if not isinstance(name, str):
            return None
        if list.__contains__(self, name):
            return name
        return next((each for each in self if _plain(each) == _plain(name)), None)

    def __contains__(self, name: object) -> bool:
        return self.spelt(name) is not None


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def below(folder: Path, name: str) -> Path:
    """The path of `name` (subfolders with / or \\) in `folder`, whose links are followed; it need not exist.

    Where only a file whose accents are written in the other way is there, that one.

    Raises PathError for an empty name, a NUL or other control character, an absolute path, a drive letter and `..`.
    """
    if not name.strip():
        raise PathError(f"the name is empty; give a file name inside {folder}")
    if any(ord(c) < 32 for c in name):
        raise PathError(f"the name {name!r} holds a control character; give a plain file name inside {folder}")
    windows = PureWindowsPath(name)
    if windows.drive or windows.root or PurePosixPath(name).is_absolute():
        raise PathError(f"the path {name!r} is absolute; give a name inside {folder}")
    parts = windows.parts
    if ".." in parts:
        raise PathError(f"the path {name!r} leaves its folder; give a name inside {folder}")
    path = folder.joinpath(*parts)
    try:
        lengths = [len(os.fsencode(part)) for part in parts]
    except UnicodeEncodeError:
        raise PathError(f"the name {name!r:.80} has characters that no file's name can have") from None
    if max(lengths, default=0) > 240 or len(str(path)) > 3000:
        raise PathError(f"the name {name[:40]!r}... is too long; give a file inside {folder}")
    if not name.isascii() and not path.exists():
        others = (folder.joinpath(*(unicodedata.normalize(form, part) for part in parts)) for form in ("NFC", "NFD"))
        return next((other for other in others if other.exists()), path)
    return path


def inside(folder: Path, name: str) -> Path:
    """As `below`, and PathError also for a link that leads out of the folder."""
    path = below(folder, name)
    try:
        real, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links
        raise PathError(f"the path {name!r} cannot be followed ({error}); give a file inside {folder}") from error
    if real != root and root not in real.parents:
        raise PathError(f"{name!r} is a link to {real}, outside {folder}; put the file itself there")
    return path


def dead_link(roots: Iterable[Path], name: str) -> str:
    """What to say of a `name` below one of the roots that meets a link which leads nowhere or in a circle; else ""."""
    for root in roots:
        path = below(root, name)
        for part in (path, *path.parents):
            if part == root:
                break
            if part.is_symlink() and not part.exists():
                return f"{part} is a link to {os.readlink(part)}, which cannot be followed: mend or replace it"
    return ""


def walked(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """(folder, the names of its folders, the names of its files) of `root` and of every folder below it, in order.

    Links are followed. One that leads in a circle is left out, and so is what cannot be looked at. Whoever takes names
    of folders out of their list keeps those from being entered.
    """
    ways: Counter[tuple[int, int]] = Counter()
    none: frozenset[tuple[int, int]] = frozenset()
    # The higher folders first: where a folder is linked to from too many, its shortest names are kept.
    waiting = deque([(root, none)])
    while waiting:
        folder, above = waiting.popleft()
        try:
            found = folder.stat()
            with os.scandir(folder) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError:
            continue
        place = (found.st_dev, found.st_ino)
        ways[place] += 1
        if place in above or ways[place] > MOST_WAYS or len(above) > DEEPEST:
            continue
        folders = [entry.name for entry in entries if _is(entry.is_dir)]
        yield folder, folders, [entry.name for entry in entries if _is(entry.is_file)]
        waiting.extend((folder / name, above | {place}) for name in folders)


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:  # a circle of links, or a disk that is away
        return False


def files_below(roots: Iterable[Path], endings: tuple[str, ...], deep: bool = True) -> list[str]:
    """Every file with one of these endings (in small letters) in the roots and, deep, below, by its name with forward
    slashes; a name once, whatever root it is in. What git keeps, and what macOS writes beside a file, is left out."""
    names: dict[str, None] = {}
    for root in roots:
        found: list[Path] = []
        for folder, folders, files in walked(root):
            if not deep:
                folders.clear()
            found += [
                folder / name
                for name in files
                if Path(name).suffix.lower() in endings
                and not name.startswith("._")
                and ".git" not in folder.relative_to(root).parts
            ]
        names |= dict.fromkeys(path.relative_to(root).as_posix() for path in sorted(found))
    return list(names)
