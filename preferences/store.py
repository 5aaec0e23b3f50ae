"""A set of preferences as a folder: pictures or latents, and pairs.jsonl, one judgement a line, read while it grows.

A line is {"prompt", "winner", "loser", "strength", "by"}: two files of the folder, by how much the winner is better (a
difference of rewards, 0 for a tie, null where somebody simply said so) and who said so. "reference" may name a third
file: the picture that an edit model was shown, which winner and loser are edits of. What one judge said last about
a pair and its prompt counts; with "undo": true the line takes the judgement back. Lines are only ever appended, each
synced, so a reader finds whole lines and perhaps an unfinished last one, which it leaves for the next time.

The folder may be a stranger's: every file lies inside it, lines have a size, pictures are PNG, JPEG or WebP read by
PIL, latents are safetensors. A bad line is named by its number and left out; the others are used.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files.atomic import tensors
from ..files.entries import LinkError
from ..files.folder import Inside, alone, inside
from ..files.growing import Folders, Growing, Shelf
from ..files.pictures import decode_opaque, rounded
from ..files.strangers import parse_line
from ..sampling.accounts import seed_of
from ..sampling.parts import Latent, each_of

PAIRS = "pairs.jsonl"
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
LATENT, KEY = ".safetensors", "latent"
ENDINGS = (*FORMATS, LATENT)
MOST_LINES, LINE_BYTES, PROMPT_LENGTH, NAME_LENGTH = 1_000_000, 65_536, 8192, 200
PIXELS, NUMBERS, PICTURE_BYTES = 2**26, 2**28, 2**28
MOST_PARTS = 8  # of a latent
SHOWN = 20
MOST_LISTED = 500  # sets beside one
FOLDERS = ("images", "latents")  # folders of a set for its files
BOOKS = 4  # sets that are kept in memory
BLIND = "blind "  # what the name of who answers a blind test begins with
_CUT_OFF = f"it is not finished, or longer than {LINE_BYTES} bytes"


@dataclass(frozen=True, slots=True)
class Pair:
    """One judgement. line: where it stands. strength: None where the judge gave none; by: who said so.

    reference: what an edit model was shown, "" for other models.
    """

    line: int
    prompt: str
    winner: str
    loser: str
    strength: float | None
    by: str
    reference: str = ""

    @property
    def key(self) -> tuple[str, ...]:
        """What it is about and who says so: of two lines with the same key the later one counts."""
        return (self.prompt, *sorted((self.winner, self.loser)), self.by, self.reference)

    @property
    def certainty(self) -> float:
        """The strength as a number: infinite where the judge gave none."""
        return math.inf if self.strength is None else self.strength


@dataclass(frozen=True)
class Preferences:
    """The judgements of a folder that count, in the order of their lines, and what is wrong with the others."""

    folder: Path
    pairs: tuple[Pair, ...]
    problems: tuple[str, ...] = ()

    def filtered(self, by: str = "*", prompt: str = "", least: float = 0.0, ties: bool = True) -> Preferences:
        """Those of judges whose names match `by`, whose prompt holds a text, that are at least so strong."""
        part = prompt.lower()
        judges = {name for name in {p.by for p in self.pairs} if fnmatch.fnmatchcase(name, by)}
        kept = [
            p for p in self.pairs
            if p.by in judges and part in p.prompt.lower() and (p.strength is None or p.strength >= least)
            and (ties or p.strength != 0)
        ]  # fmt: skip
        return replace(self, pairs=tuple(kept))

    def split(self, share: float, seed: int) -> tuple[Preferences, Preferences]:
        """(for training, held out): about a share of the prompts with all their pairs is held out.

        Each prompt is drawn by itself, so a set that grows keeps its split. ValueError for a share outside 0 to 1.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"the share that is held out must be 0 to 1, got {share!r}: 0.1 is usual")
        prompts = {p.prompt for p in self.pairs} if share else set()
        out = {prompt for prompt in prompts if seed_of(seed, prompt, "held out") / 2**63 < share}
        parts = [tuple(p for p in self.pairs if (p.prompt in out) is held) for held in (False, True)]
        return replace(self, pairs=parts[0]), replace(self, pairs=parts[1])

    def statistics(self) -> str:
        """The set in a few lines for people, its bad lines included."""
        pairs, judges = self.pairs, Counter(p.by for p in self.pairs)
        strengths = sorted(p.strength for p in pairs if p.strength is not None)
        decided = {(p.prompt, p.winner, p.loser) for p in pairs if p.strength != 0}
        both = sum((prompt, b, a) in decided for prompt, a, b in decided) // 2
        lines = [
            f"{len(pairs)} pairs, {len({p.prompt for p in pairs})} prompts, "
            f"{len({n for p in pairs for n in (p.winner, p.loser)})} pictures, "
            f"{sum(p.strength == 0 for p in pairs)} ties, {both} judged both ways",
            *(f"by {name or 'nobody'}: {count}" for name, count in judges.most_common(SHOWN)),
        ]
        if strengths:
            low, middle, high = (strengths[round(q * (len(strengths) - 1))] for q in (0.1, 0.5, 0.9))
            lines.append(f"strength: median {middle:.4g}, 80 % of them {low:.4g} to {high:.4g}")
        lines += self.problems[:SHOWN]
        if len(self.problems) > SHOWN:
            lines.append(f"and {len(self.problems) - SHOWN} further lines that cannot be used")
        return "\n".join(lines)


def refuse_empty(folder: Path | Inside) -> None:
    """ValueError for a set to which nothing was added yet."""
    place = inside(folder)
    if not (place / PAIRS).is_file():
        others = _beside(place.path)
        known = f" (there are pairs in {', '.join(others)})" if others else ""
        raise ValueError(
            f"the set {place.path.name!r} is empty{known}: choose some pictures in Preference Picker first, or let "
            "Label Pairs judge some"
        )


def _beside(folder: Path) -> list[str]:
    """The sets in the same folder that have pairs and are no blind test's, those that were changed last first."""
    try:
        there = {name: inside(folder.parent) / name / PAIRS for name in inside(folder.parent).folders()[:MOST_LISTED]}
        changed = {name: pairs.changed() for name, pairs in there.items() if pairs.is_file()}
    except OSError:
        return []
    latest = sorted(changed, key=lambda name: -changed[name])
    return list(islice((name for name in latest if not _is_test(folder.parent / name)), SHOWN))


def _is_test(folder: Path) -> bool:
    """Whether a set holds the answers to a blind test, which nobody trains on."""
    try:
        with (inside(folder) / PAIRS).open() as handle:
            first = parse_line(handle.readline(LINE_BYTES), LINE_BYTES)
    except (OSError, ValueError):
        return False
    return isinstance(first, dict) and str(first.get("by", "")).startswith(BLIND)


def read(folder: Path | Inside) -> Preferences:
    """The set in a folder. ValueError when there is none; what is wrong with single lines is in `problems`.

    What was read of the last few sets is kept, so that of one that has grown only what is new is read.
    """
    place = inside(folder)
    with _books.take(place.root, place.parts) as book:
        return book.preferences()


def judgement(folder: Path | Inside, line: int) -> Pair | None:
    """What a line of a set says, whether it still counts or not; None where it says nothing that can be read."""
    place = inside(folder)
    with _books.take(place.root, place.parts) as book:
        return book.said(line)


class Book:
    """The judgements of a set as they are read on."""

    def __init__(self, folder: Inside):
        self._folder = folder
        self._lines = Growing(folder / PAIRS, LINE_BYTES, MOST_LINES)
        self._folders = Folders(folder, *FOLDERS)
        self._told: list[tuple[int, Pair, bool] | str] = []
        self._found: Preferences | None = None
        self.refresh()

    def refresh(self) -> None:
        """Read what has come since. ValueError where there is no set."""
        refuse_empty(self._folder)
        if self._lines.moved():
            self._lines.forget()
            self._told, self._found = [], None
        count, torn = len(self._told), self._lines.unfinished
        for number, line in self._lines.lines():
            try:
                self._told.append((number, *_judgement(number, line)))
            except ValueError as error:
                self._told.append(f"line {number}: {str(error)[:200]}")
        if self._folders.look() or len(self._told) > count or self._lines.unfinished != torn or self._elsewhere:
            self._found = None

    _elsewhere = False  # whether pairs name files that lie in neither folder, which are looked for each time

    def said(self, line: int) -> Pair | None:
        """The judgement of a line."""
        told = (one for one in self._told if not isinstance(one, str))
        return next((pair for number, pair, undone in told if number == line and not undone), None)

    def preferences(self) -> Preferences:
        """The set as it is now."""
        if self._found is None:
            self._found = self._counted()
        return self._found

    def _counted(self) -> Preferences:
        latest: dict[tuple[str, ...], Pair | None] = {}
        problems: list[str] = []
        known: dict[str, str] = {}
        there = self._folders.there
        for told in self._told:
            if isinstance(told, str):
                problems.append(told)
                continue
            number, pair, undone = told
            wrong = ""
            for name in _files(pair):
                if name in there and name.lower().endswith(ENDINGS):
                    continue
                if name not in known:
                    known[name] = trouble(self._folder, name)
                wrong = wrong or known[name]
            if wrong:
                problems.append(f"line {number}: {wrong[:200]}")
                continue
            before = latest.pop(pair.key, None)
            if before is not None and not undone and before.winner != pair.winner:
                problems.append(f"line {before.line}: {pair.by or 'the same judge'} said the opposite in line {number}")
            latest[pair.key] = None if undone else pair
        if self._lines.unfinished is not None:
            problems.append(f"line {self._lines.unfinished}: {_CUT_OFF}")
        self._elsewhere = any(PurePosixPath(name).parent.as_posix() not in FOLDERS for name in known)
        pairs = tuple(pair for pair in latest.values() if pair is not None)
        return Preferences(self._folder.path, pairs, tuple(problems))


_books = Shelf(lambda root, parts: Book(Inside(root, *parts)), BOOKS)


def numbered_lines(path: Inside) -> Iterator[tuple[int, bytes | None]]:
    """(number, line) of every line that holds something; None for one that is too long, or not finished."""
    lines = Growing(path, LINE_BYTES, MOST_LINES)
    yield from lines.lines()
    if lines.unfinished is not None:
        yield lines.unfinished, None


def _judgement(number: int, line: bytes | None) -> tuple[Pair, bool]:
    """(the judgement, whether it is taken back). ValueError says what is wrong with the line."""
    if line is None:
        raise ValueError(_CUT_OFF)
    row = parse_line(line, LINE_BYTES)
    if not isinstance(row, dict):
        raise ValueError("it is no object with prompt, winner and loser")
    texts: dict[str, str] = {}
    for name in ("prompt", "winner", "loser", "by", "reference"):
        most = PROMPT_LENGTH if name == "prompt" else NAME_LENGTH
        value = row.get(name, "" if name in ("by", "reference") else None)
        if not isinstance(value, str) or len(value) > most:
            raise ValueError(f"{name} must be a text of at most {most} characters, got {value!r:.40}")
        texts[name] = value
    strength = row.get("strength")
    if strength is not None:
        if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1e9:
            raise ValueError(f"strength must be a number from 0 to 1e9, or null, got {strength!r:.40}")
        strength = float(strength)
    if texts["winner"] == texts["loser"]:
        raise ValueError(f"winner and loser are the same picture, {texts['winner']!r:.80}")
    undone = row.get("undo", False)
    if not isinstance(undone, bool):
        raise ValueError(f"undo must be true or false, got {undone!r:.40}")
    return Pair(number, strength=strength, **texts), undone


def _files(pair: Pair) -> tuple[str, ...]:
    """The files of the set that a pair names."""
    return (pair.winner, pair.loser, *([pair.reference] if pair.reference else []))


def trouble(folder: Path | Inside, name: str) -> str:
    """What is wrong with a file's name in a set, "" when nothing is."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or set("\\:\0") & set(name):
        return f"{name!r:.80} leads out of the set's folder"
    if path.suffix.lower() not in (*FORMATS, LATENT):
        return f"{name!r:.80} is no picture ({', '.join(FORMATS)}) and no latent ({LATENT})"
    try:
        return "" if (inside(folder) / path.as_posix()).is_file() else f"{name!r:.80} is missing"
    except LinkError:
        return f"{name!r:.80} is a link, or lies behind one, and none is followed in a set"
    except (OSError, ValueError) as error:
        return f"{name!r:.80} cannot be looked at ({error})"


def append(folder: Path | Inside, judgements: Iterable[Mapping[str, Any]]) -> int:
    """Append lines, each with the fields of a `Pair` (and "undo"), and wait until they are on the disk; their number.

    ValueError for a line that no reader would take; then nothing is written.
    """
    lines = []
    for row in judgements:
        line = (json.dumps({k: v for k, v in row.items() if k != "line"}) + "\n").encode()
        pair, _ = _judgement(0, line if len(line) <= LINE_BYTES else None)
        for name in _files(pair):
            if wrong := trouble(folder, name):
                raise ValueError(wrong)
        lines.append(line)
    if not lines:
        return 0
    (inside(folder) / PAIRS).append(lines)
    return len(lines)


def keep_image(folder: Path | Inside, image: Tensor) -> str:
    """Store a picture (H, W, 3) in [0, 1] as PNG; the name that its content has in the set."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(rounded(image).numpy()).save(buffer, "PNG")
    return keep_file(folder, buffer.getvalue(), ".png")


def keep_latent(folder: Path | Inside, latent: Latent) -> str:
    """Store a latent (C, H, W) or (C, T, H, W), or all its parts; the name that its content has in the set."""
    parts = {_key(number): part.detach().float() for number, part in enumerate(each_of(latent))}
    return keep_file(folder, tensors(parts), LATENT)


def _key(number: int) -> str:
    return f"{KEY}_{number}" if number else KEY


def keep_file(folder: Path | Inside, data: bytes, suffix: str) -> str:
    """Store a file's content under a name made of it, so that the same one is there once; that name."""
    kind = "latents" if suffix == LATENT else "images"
    name = f"{kind}/{hashlib.blake2b(data, digest_size=16).hexdigest()}{suffix}"
    kept = inside(folder) / name
    if not kept.is_file():
        kept.write(data)
    return name


def is_latent(name: str) -> bool:
    """Whether a file of a set holds a latent rather than a picture."""
    return name.lower().endswith(LATENT)


def load_image(source: Path | Inside | bytes) -> Tensor:
    """A picture (H, W, 3) in [0, 1] as a viewer shows it: upright, and on white where it is transparent.

    ValueError for anything else, and for one of more than 64 million pixels.
    """
    where = "a picture" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else alone(source).read(PICTURE_BYTES)
        return decode_opaque(data, tuple(FORMATS.values()), PIXELS)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} cannot be read: {error}") from error


def load_latent(path: Path | Inside) -> Latent:
    """A latent (C, H, W) or (C, T, H, W), or its parts. ValueError for a file that holds none."""
    try:
        with safe_open(alone(path).checked(), "pt") as handle:
            names = [_key(number) for number in range(max(1, min(len(handle.keys()), MOST_PARTS)))]
            for name in names:
                shape = handle.get_slice(name).get_shape()
                if not (1 < len(shape) < 5 and 0 < math.prod(shape) <= NUMBERS):
                    raise ValueError(f"its shape {shape} is not that of a latent")
            parts = tuple(handle.get_tensor(name).float() for name in names)
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"latent {path} cannot be read: {error}") from error
    if not all(bool(torch.isfinite(part).all()) for part in parts):
        raise ValueError(f"latent {path} holds NaN or infinite numbers")
    return parts if len(parts) > 1 else parts[0]


def ranked_pairs(scores: Sequence[float], how: str, margin: float) -> list[tuple[int, int, float]]:
    """(winner, loser, difference) of candidates by their scores, those that differ by more than a margin.

    how: "all" - every two of them; "best_worst" - one pair; "halves" - the best with the best of the lower half, the
    second with the second, so that each candidate is in one pair.
    """
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    half = len(order) // 2
    chosen = {
        "all": [(a, b) for place, a in enumerate(order) for b in order[place + 1 :]],
        "best_worst": [(order[0], order[-1])] if len(order) > 1 else [],
        "halves": list(zip(order[:half], order[len(order) - half :], strict=True)),
    }[how]
    pairs = [(a, b, scores[a] - scores[b]) for a, b in chosen]
    return [pair for pair in pairs if pair[2] > margin]
