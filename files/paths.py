"""Names from a workflow turned into paths that cannot leave the folder they belong to."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from .errors import UsageError


class PathError(UsageError):
    """A name that does not stay inside its folder."""


def inside(folder: Path, name: str) -> Path:
    """The path of `name` (subfolders with / or \\) inside `folder`; it need not exist.

    Raises PathError for an empty name, a NUL or other control character, an absolute path, a drive letter, `..` and a
    link that leads out of the folder.
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
    if any(len(part.encode()) > 240 for part in parts) or len(str(path)) > 3000:
        raise PathError(f"the name {name[:40]!r}... is too long; give a file inside {folder}")
    try:
        real, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links
        raise PathError(f"the path {name!r} cannot be followed ({error}); give a file inside {folder}") from error
    if real != root and root not in real.parents:
        raise PathError(f"{name!r} is a link to {real}, outside {folder}; put the file itself there")
    return path
