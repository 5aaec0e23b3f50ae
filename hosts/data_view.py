"""What a page sees of data to train on, and may change: folders of pictures with captions, and the pairs of a set.

Page by page, so that a folder or set of 100,000 stays quick. All names come from whoever sent the request. A folder of
pictures lies in ComfyUI's input folder, or a link there leads to it; a picture's caption is the text file of its name
beside it, which core's nodes read too. A picture is taken out by a name that no node takes for a picture's, and put
back by its own; its caption stays. A pair is taken out by a line that takes the judgement back, and put back by the
line that it was.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..files.atomic import checked_name
from ..files.folder import Inside, inside
from ..files.growing import Folders
from ..files.looks import FORMATS, Look, Looks
from ..files.strangers import plain
from ..files.texts import decode
from ..preferences.store import PAIRS, Pair, append, is_latent, judgement, read
from .patience import soon

MOST_FOLDERS, PROBED = 200, 50  # folders that are shown; entries of each that are looked at for a picture
COUNTING = 0.1  # seconds of a list in which folders that have changed are counted
PAGE = 50
OUT = ".taken_out"  # what the name of a picture that was taken out ends in
CAPTION = 8192  # characters
CAPTION_BYTES = 1 << 16
KEPT = 4  # folders whose looks are kept in memory


@dataclass(frozen=True)
class Caption:
    """caption: of a picture, empty where it has none. version: tells what its file holds from anything else, empty
    where there is no file. note: why the caption cannot be shown whole, and so not be edited; it is empty then."""

    caption: str = ""
    version: str = ""
    note: str = ""


class ChangedError(ValueError):
    """The caption on disk is another one than was edited; `now` is what there is."""

    def __init__(self, name: str, now: Caption):
        super().__init__(f"the caption of {name} was changed meanwhile: look at it and write it again")
        self.now = now


class _Pictures:
    """A folder's pictures by name, looked for again when the folder has changed, and what they look like."""

    def __init__(self, folder: Path):
        self._files = Folders(inside(folder))
        self.looks = Looks(inside(folder))
        self.names: list[str] = []
        self.out: list[str] = []  # the names that pictures had before they were taken out
        self.bare: frozenset[str] = frozenset()  # pictures without a caption, where others have one

    def refresh(self) -> None:
        if self._files.look():
            there = [PurePosixPath(name).name for name in self._files.there]
            self.names = sorted(name for name in there if is_picture(name))
            out = (name.removesuffix(OUT) for name in there if name.endswith(OUT))
            self.out = sorted(name for name in out if is_picture(name))
            captioned = {PurePosixPath(name).stem for name in there if name.endswith(".txt")}
            bare = [name for name in self.names if PurePosixPath(name).stem not in captioned]
            self.bare = frozenset(bare if len(bare) < len(self.names) else ())


_kept: OrderedDict[Path, _Pictures] = OrderedDict()
_lock = threading.Lock()


def is_picture(name: str) -> bool:
    """By its ending."""
    return PurePosixPath(name).suffix.lower() in FORMATS


def _pictures(folder: Path) -> _Pictures:
    with _lock:
        found = _kept.setdefault(folder, _Pictures(folder))
        _kept.move_to_end(folder)
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    found.refresh()
    return found


# ---- folders of pictures -------------------------------------------------------------------------


def folders(inputs: Path) -> list[dict[str, Any]]:
    """The folders in the input folder that hold pictures, by name, with how many `pictures` where that is known."""
    found: list[dict[str, Any]] = []
    until = time.monotonic() + COUNTING
    for name in inside(inputs).folders(linked=True):
        if len(found) < MOST_FOLDERS and any(map(is_picture, inside(inputs / name).files(PROBED))):
            found.append({"name": name, **_count(inputs / name, time.monotonic() < until)})
    return found


_counts: OrderedDict[Path, tuple[int, dict[str, Any]]] = OrderedDict()


def _count(folder: Path, may_look: bool) -> dict[str, Any]:
    """How many `pictures` a folder has; what was known before, or nothing, where it may not be looked at now."""
    before, when = _counts.get(folder), folder.stat().st_mtime_ns
    if (before is None or before[0] != when) and may_look:
        try:
            files = soon(("count", folder), f"the folder {folder.name}", lambda: inside(folder).files())
        except BlockingIOError:
            return before[1] if before else {}
        before = when, {"pictures": sum(map(is_picture, files))}
        _counts[folder] = before
        while len(_counts) > 2 * MOST_FOLDERS:
            _counts.popitem(last=False)
    return before[1] if before else {}


def pictures(
    inputs: Path, folder: str, offset: int, find: str = "", marked: bool = False, out: bool = False
) -> dict[str, Any]:
    """A page of a folder: `total` that fit, `looked` at of `of`, and of each its `Caption`, file, size and marks.

    find: part of the name. marked: only those that are marked, of those that were looked at. out: those that were taken
    out instead, which are not looked at. ValueError for a name that leads elsewhere, FileNotFoundError where there is
    no such folder, BlockingIOError while a large one is read.
    """
    place = _folder(inputs, folder)
    held = soon(("pictures", place.path), f"the folder {folder}", lambda: _pictures(place.path))
    names, looks = held.names, held.looks
    if out:
        fitting = held.out
    elif marked:
        found = soon(("marked", place.path), f"the folder {folder}", looks.marked)
        fitting = sorted(held.bare.union(found)) if held.bare else found
    else:
        fitting = names
    if part := find.lower():
        fitting = [name for name in fitting if part in name.lower()]
    shown = fitting[offset : offset + PAGE]
    looked = looks.ask(names, () if out else shown)
    return {
        "total": len(fitting), "of": len(names), "looked": looked,
        "pictures": [{"name": name, **vars(_caption(place, name)), **_told(held, name, out)} for name in shown],
    }  # fmt: skip


def without_caption(inputs: Path, folder: str) -> tuple[int, int]:
    """(pictures of a folder that have no text file, all of its pictures). Errors are those of `pictures`."""
    names = _folder(inputs, folder).files()
    found = [name for name in names if is_picture(name)]
    captioned = {PurePosixPath(name).stem for name in names if name.endswith(".txt")}
    return sum(PurePosixPath(name).stem not in captioned for name in found), len(found)


def take_out_picture(inputs: Path, folder: str, name: str) -> None:
    """Give a picture a name by which no node takes it for one. FileNotFoundError where there is none, ValueError for
    the name of something else, or where another picture of that name was taken out before."""
    _renamed(inputs, folder, name, name, name + OUT)


def put_back_picture(inputs: Path, folder: str, name: str) -> None:
    """Give a picture that was taken out its own name again. Errors are those of `take_out_picture`."""
    _renamed(inputs, folder, name, name + OUT, name)


def _renamed(inputs: Path, folder: str, name: str, old: str, new: str) -> None:
    place = _folder(inputs, folder)
    if not is_picture(_plain(name)):
        raise ValueError(f"{name!r:.140} is no picture's name")
    file = place / old
    if not file.is_file():
        raise FileNotFoundError(f"there is no picture called {name!r:.140}" + " that was taken out" * (old != name))
    if not file.rename(new):
        raise ValueError(f"the folder {folder} has a file called {new} already: give one of them another name")


def write_caption(inputs: Path, folder: str, name: str, caption: str, before: str) -> str:
    """Write a picture's caption, and give its version. before: the version that was shown; ChangedError where it is
    another one now, and ValueError where what is there cannot be shown whole: it stays as it is."""
    place = _folder(inputs, folder)
    if not is_picture(_plain(name)):
        raise ValueError(f"{name!r:.140} is no picture's name")
    if not ((place / name).is_file() or (place / (name + OUT)).is_file()):
        raise FileNotFoundError(f"there is no picture called {name!r:.140}")
    if len(caption) > CAPTION or caption != caption.encode(errors="replace").decode():
        raise ValueError(f"a caption is a text of at most {CAPTION} characters")
    now = _caption(place, name)
    if now.note:
        raise ValueError(f"the caption of {name} cannot be edited here: {now.note}")
    if now.caption == caption.strip():
        return now.version
    if now.version != before:
        raise ChangedError(name, now)
    data = caption.encode()
    _file_of(place, name).write(data)
    return _version(data)


def _folder(inputs: Path, folder: str) -> Inside:
    # The user's choice, which may be a link; what lies in it may not.
    place = inside(inputs / checked_name(folder))
    if not place.is_dir():
        raise FileNotFoundError(f"there is no folder called {folder!r:.140} in the input folder")
    return place


def _plain(name: str) -> str:
    if PurePosixPath(name).name != name or set("\\:\0") & set(name):
        raise ValueError(f"{name!r:.140} is no file's name")
    return name


def _version(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _file_of(place: Inside, name: str) -> Inside:
    return place / f"{PurePosixPath(name).stem}.txt"


def _caption(place: Inside, name: str) -> Caption:
    file = _file_of(place, name)
    try:
        found = file.stat()
        if found is None:
            return Caption()
        if found.st_size > CAPTION_BYTES:
            return Caption(note=f"{file.name} has {found.st_size} bytes, and {CAPTION_BYTES} can be shown")
        data = file.read(CAPTION_BYTES)
        caption = decode(data).strip()
    except (OSError, ValueError) as error:
        return Caption(note=f"{file.name} cannot be read: {plain(getattr(error, 'strerror', None) or str(error))}")
    if len(caption) > CAPTION:
        return Caption(note=f"{file.name} holds {len(caption)} characters, and {CAPTION} can be shown")
    return Caption(caption, _version(data))


def _told(held: _Pictures, name: str, out: bool) -> dict[str, Any]:
    if out:
        return {"file": name + OUT, "size": None, "marks": []}
    found = held.looks.of(name)
    size = [found.width, found.height] if isinstance(found, Look) else None
    return {"file": name, "size": size, "marks": held.looks.marks(name) + [["bare", ""]] * (name in held.bare)}


# ---- pairs of a set ------------------------------------------------------------------------------


def pairs(sets: Path, name: str, offset: int, find: str = "") -> dict[str, Any]:
    """A page of a set's pairs, the latest first: `total` that fit, and of each what it says. find: part of the prompt.

    Errors are those of `pictures`.
    """
    folder = _set(sets, name)
    found = soon(("pairs", folder), f"the set {name}", lambda: read(folder)).pairs
    part = find.lower()
    fitting = [pair for pair in found if part in pair.prompt.lower()] if part else found
    end = len(fitting) - offset
    shown = fitting[max(0, end - PAGE) : max(0, end)][::-1]
    return {"total": len(fitting), "pairs": [_shown(pair) for pair in shown]}


def take_out(sets: Path, name: str, line: int) -> None:
    """Take the pair that a line told of out of the set, where it is in. FileNotFoundError for no pair."""
    folder, pair, there = _told_of(sets, name, line)
    if there:
        append(folder, [_row(pair) | {"undo": True}])


def put_back(sets: Path, name: str, line: int) -> None:
    """Put the pair that a line told of back into the set, where it is out. FileNotFoundError for no pair."""
    folder, pair, there = _told_of(sets, name, line)
    if not there:
        append(folder, [_row(pair)])


def _told_of(sets: Path, name: str, line: int) -> tuple[Path, Pair, bool]:
    """(the set's folder, the pair that a line told of, whether its judge's word on these pictures counts)."""
    folder = _set(sets, name)
    pair = judgement(folder, line)
    if pair is None:
        raise FileNotFoundError(f"line {line} of the set tells of no pair")
    return folder, pair, any(one.key == pair.key for one in read(folder).pairs)


def _row(pair: Pair) -> dict[str, Any]:
    row = {name: getattr(pair, name) for name in ("prompt", "winner", "loser", "strength", "by")}
    return row | ({"reference": pair.reference} if pair.reference else {})


def _set(sets: Path, name: str) -> Path:
    folder = sets / checked_name(name)
    if folder.is_symlink() or not (inside(folder) / PAIRS).is_file():
        raise FileNotFoundError(f"there is no set called {name!r:.140}")
    return folder


def _shown(pair: Pair) -> dict[str, Any]:
    latent = is_latent(pair.winner) or is_latent(pair.loser)
    files = {} if latent else {"winner": Path(pair.winner).stem, "loser": Path(pair.loser).stem}
    return {"line": pair.line, "prompt": pair.prompt[:2000], "tie": pair.strength == 0, "by": pair.by, **files}
