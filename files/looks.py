"""What many pictures look like: sizes and perceptual hashes, looked at in the background while somebody asks.

A hash is a difference hash of 64 bits: the picture in grey, 9 x 8 pixels, one bit for each two neighbours in a row.
Pictures of which at most `NEAR` bits differ, and no mean colour of 4 x 4 parts by more than `PALE`, look alike, such as
a copy in another size or format. A flat picture, whose neighbours are all equal, looks like nothing else.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .folder import Inside

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
PIXELS, PICTURE_BYTES = 2**26, 2**28
NEAR = 4  # bits
PALE = 24  # of 255, in each of red, green and blue
PARTS = NEAR + 1  # of the bits: two hashes that are near have one part in common
MOST_ALIKE = 64  # of pictures with one part in common, those that are compared
LEFT = 20.0  # seconds after the last question until nobody is thought to look any more
LONG = 2.0  # a picture's longer side over its shorter one, beyond which it is marked
SMALL = 0.5  # a picture's shorter side over the usual one of its folder, below which it is marked
SAME, ENOUGH = 0.75, 8  # share of so many pictures, from which on one size is the usual one and others are marked


@dataclass(frozen=True, slots=True)
class Look:
    """A picture's size in pixels as a viewer shows it; its hash, None for a flat picture; 48 bytes of its colours."""

    width: int
    height: int
    hash: int | None
    colours: bytes = b""


def look(data: bytes) -> Look:
    """ValueError for what is no PNG, JPEG or WebP of at most 64 million pixels."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=tuple(set(FORMATS.values()))) as image:
            if image.width * image.height > PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are too many")
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            width, height = image.size[::-1] if turned else image.size
            image.draft("RGB", (72, 64))
            # Small before it is turned: a picture may have many pixels.
            whole: Any = (image if image.mode == "RGB" else image.convert("RGB")).resize((72, 72), Image.Resampling.BOX)
            whole.getexif()[0x0112] = image.getexif().get(0x0112, 1)
            whole = ImageOps.exif_transpose(whole)
            grey = whole.convert("L").resize((9, 8), Image.Resampling.BOX).tobytes()
            colours = whole.resize((4, 4), Image.Resampling.BOX).tobytes()
    except UnidentifiedImageError as error:
        raise ValueError("it is no PNG, JPEG or WebP") from error
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads to
        raise ValueError(str(error) or type(error).__name__) from error
    bits = [grey[9 * row + i] < grey[9 * row + i + 1] for row in range(8) for i in range(8)]
    flat = len(set(grey)) == 1
    return Look(width, height, None if flat else sum(bit << place for place, bit in enumerate(bits)), colours)


def alike(one: Look, other: Look) -> bool:
    """Whether two pictures look alike."""
    if one.hash is None or other.hash is None or (one.hash ^ other.hash).bit_count() > NEAR:
        return False
    return all(abs(a - b) <= PALE for a, b in zip(one.colours, other.colours, strict=True))


class Looks:
    """The looks of a folder's pictures. Several threads may ask."""

    def __init__(self, folder: Inside):
        self._folder = folder
        self._lock = threading.Lock()
        self._asked = 0.0
        self._worker: threading.Thread | None = None
        self._forget()

    def _forget(self) -> None:
        self._known: dict[str, Look | str] = {}
        self._first: dict[str, str] = {}  # of a picture, an earlier one that looks alike
        self._parts: list[dict[int, list[tuple[str, Look]]]] = [{} for _ in range(PARTS)]
        self._marked: tuple[int, list[str]] = (-1, [])
        self._usual: tuple[int, float, tuple[int, int] | None] = (0, 0.0, None)

    def ask(self, names: Sequence[str], first: Iterable[str] = ()) -> int:
        """Go on looking, `first` before the others; how many of `names` were looked at."""
        with self._lock:
            if len(self._known) > len(names) or not self._known.keys() <= set(names):
                self._forget()  # some are gone, and others may have looked like them
            known = len(self._known)
            self._asked = time.monotonic()
            if known < len(names) and (self._worker is None or not self._worker.is_alive()):
                left = [*first, *names]
                self._worker = threading.Thread(target=self._work, args=(left, self._parts), daemon=True)
                self._worker.start()
        return known

    def _work(self, names: list[str], parts: list[dict[int, list[tuple[str, Look]]]]) -> None:
        for name in names:
            if name in self._known:
                continue
            found: Look | str
            try:
                found = look((self._folder / name).read(PICTURE_BYTES))
            except (OSError, ValueError) as error:
                found = str(error)[:200] or "it cannot be read"
            with self._lock:
                if parts is not self._parts or time.monotonic() - self._asked > LEFT:
                    return
                self._keep(name, found)

    def _keep(self, name: str, found: Look | str) -> None:
        self._known[name] = found
        if len(self._known) >= 1.1 * self._usual[0]:
            sizes = [(one.width, one.height) for one in self._known.values() if isinstance(one, Look)]
            most, count = Counter(sizes).most_common(1)[0] if sizes else (None, 0)
            usual = most if count >= max(SAME * len(sizes), ENOUGH) else None
            self._usual = len(self._known), statistics.median(map(min, sizes)) if sizes else 0.0, usual
        if isinstance(found, str) or found.hash is None:
            return
        width = -(-64 // PARTS)
        for place, part in enumerate(self._parts):
            same = part.setdefault(found.hash >> place * width & (1 << width) - 1, [])
            for other, its in same[:MOST_ALIKE]:
                if name not in self._first and alike(its, found):
                    self._first[name] = other
            same.append((name, found))

    def of(self, name: str) -> Look | str | None:
        """A picture's look, or what is wrong with it; None where it was not looked at yet."""
        return self._known.get(name)

    def marks(self, name: str) -> list[list[str]]:
        """What is to be looked at, each [kind, of what]: like, small, long, size, bad."""
        found = self.of(name)
        if found is None:
            return []
        if isinstance(found, str):
            return [["bad", found]]
        marks = [["like", self._first[name]]] if name in self._first else []
        short, long = sorted((found.width, found.height))
        if short < SMALL * self._usual[1]:
            marks.append(["small", ""])
        if long > LONG * short:
            marks.append(["long", ""])
        if not marks and self._usual[2] not in (None, (found.width, found.height)):
            marks.append(["size", ""])
        return marks

    def marked(self) -> list[str]:
        """The pictures with marks, by name; of very many, as things stood some hundred pictures ago."""
        with self._lock:
            known = list(self._known)
        stage = len(known) // (1 + len(known) // 64)
        if self._marked[0] != stage:
            self._marked = stage, sorted(name for name in known if self.marks(name))
        return self._marked[1]

    def settled(self, seconds: float) -> None:
        """Wait until all is looked at, but no longer than this."""
        worker = self._worker
        if worker is not None:
            with contextlib.suppress(RuntimeError):
                worker.join(seconds)
