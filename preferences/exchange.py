"""Sets of preferences from and to plain files: a folder of pictures with a list of pairs, or parquet, as Pick-a-Pic.

The columns are those of Pick-a-Pic (Kirstain et al. 2023, arXiv 2305.01569), which diffusers' DPO scripts read:
caption, jpg_0, jpg_1 and label_0, which is 1 where the first picture is preferred, 0 where the second is and 0.5 for a
tie. A folder holds train/metadata.jsonl, whose jpg_0_file_name and jpg_1_file_name lie beside it (an image folder of
the `datasets` package); a parquet file holds the pictures' own bytes. Both may be a stranger's: a bad row is named and
left out. Nothing but PNG, JPEG and WebP is taken, and it is stored as it comes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from ..files.folder import Inside, inside
from ..files.strangers import parse
from ..files.texts import clean
from .store import (
    LINE_BYTES,
    MOST_LINES,
    PROMPT_LENGTH,
    Pair,
    Preferences,
    append,
    is_latent,
    keep_file,
    load_image,
    numbered_lines,
    trouble,
)

METADATA = "train/metadata.jsonl"
MOST_BYTES = 2**27  # of one picture
ROWS = 16  # read and written at once: pictures are large
AT_ONCE = 256  # lines; each time is waited for the disk
SIGNATURES = ((b"\x89PNG", ".png"), (b"\xff\xd8\xff", ".jpg"), (b"RIFF", ".webp"))
# Number, caption, first picture, second picture, label.
Row = tuple[int, str, bytes, bytes, float]


def take_in(source: Path, folder: Path, by: str) -> tuple[int, list[str]]:
    """Add the pairs of a folder or parquet file to a set, as judged by `by`; (how many, what is wrong with others).

    ValueError when the source is neither, ImportError when it is parquet and pyarrow is not installed.
    """
    if source.is_dir():
        rows = _folder_rows(source)
    elif source.suffix.lower() == ".parquet" and source.is_file():
        rows = _parquet_rows(source)
    else:
        raise ValueError(f"{source} is neither a folder with {METADATA} nor a .parquet file")
    taken, problems = 0, []
    waiting: list[dict[str, Any]] = []
    for row in rows:
        if isinstance(row, str):
            problems.append(row)
            continue
        number, caption, *pictures, label = row
        try:
            if label not in (0.0, 0.5, 1.0):
                raise ValueError(f"label_0 is {label!r:.40}, which is not 0, 0.5 or 1")
            if len(caption) > PROMPT_LENGTH:
                raise ValueError(f"the caption has more than {PROMPT_LENGTH} characters")
            if pictures[0] == pictures[1]:
                raise ValueError("both pictures are the same")
            first, second = (_kept(folder, data) for data in pictures)
        except ValueError as error:
            problems.append(f"row {number}: {str(error)[:200]}")
            continue
        winner, loser = (second, first) if label == 0.0 else (first, second)
        strength = 0 if label == 0.5 else None
        waiting.append({"prompt": caption, "winner": winner, "loser": loser, "strength": strength, "by": by})
        if len(waiting) == AT_ONCE:
            taken += append(folder, waiting)
            waiting = []
    return taken + append(folder, waiting), problems


def _kept(folder: Path, data: bytes) -> str:
    load_image(data)  # what cannot be read is not stored
    return keep_file(folder, data, next(suffix for begin, suffix in SIGNATURES if data.startswith(begin)))


def _row(number: int, caption: Any, pictures: list[bytes], label: Any) -> Row | str:
    if not isinstance(caption, str) or isinstance(label, bool) or not isinstance(label, int | float):
        return f"row {number}: it needs a caption and a label_0"
    return number, clean(caption), pictures[0], pictures[1], float(label)


def _folder_rows(source: Path) -> Iterator[Row | str]:
    places = (inside(source) / METADATA, inside(source) / PurePosixPath(METADATA).name)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ValueError(f"{source} holds no pairs: there is no {METADATA}")
    for number, line in numbered_lines(path):
        try:
            if line is None:
                raise ValueError(f"it is not finished, or longer than {LINE_BYTES} bytes")
            found = parse(line)
            names = [found["jpg_0_file_name"], found["jpg_1_file_name"]]
            for name in names:
                if not isinstance(name, str):
                    raise ValueError(f"{name!r:.80} is no file's name")
                if wrong := trouble(path.parent, name):
                    raise ValueError(wrong)
            pictures = [(path.parent / name).read(MOST_BYTES) for name in names]
            yield _row(number, found["caption"], pictures, found["label_0"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            yield f"row {number}: {type(error).__name__}: {str(error)[:200]}"


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "parquet files need pyarrow: install retort[parquet], or use a folder of plain files"
        ) from error
    return pyarrow


def _parquet_rows(source: Path) -> Iterator[Row | str]:
    arrow = _pyarrow()
    wanted = ["caption", "jpg_0", "jpg_1", "label_0"]
    try:
        with (inside(source.parent) / source.name).open() as opened, arrow.parquet.ParquetFile(opened) as file:
            missing = [name for name in wanted if name not in file.schema_arrow.names]
            if missing:
                raise ValueError(f"{source} has no column {missing[0]}; it needs {', '.join(wanted)}")
            number = 0
            for batch in file.iter_batches(batch_size=ROWS, columns=wanted):
                for place in range(len(batch)):
                    number += 1
                    if number > MOST_LINES:
                        return
                    try:
                        (found,) = batch.slice(place, 1).to_pylist()
                    except UnicodeDecodeError:
                        yield f"row {number}: a text in it is not in UTF-8"
                        continue
                    # Image columns of the `datasets` package are {"bytes", "path"}; the path is not followed.
                    values = (found["jpg_0"], found["jpg_1"])
                    given = [value.get("bytes") if isinstance(value, dict) else value for value in values]
                    pictures = [data for data in given if isinstance(data, bytes) and 0 < len(data) <= MOST_BYTES]
                    if len(pictures) == 2:
                        yield _row(number, found["caption"], pictures, found["label_0"])
                    else:
                        yield f"row {number}: it does not hold the bytes of two pictures"
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{source} cannot be read: {error}; export it anew") from error


def _rows_out(preferences: Preferences) -> Iterator[tuple[Pair, list[Inside], float]]:
    """(pair, its pictures, label_0); every other pair with the loser first, so that no order tells the winner."""
    for number, pair in enumerate(preferences.pairs):
        names = [pair.winner, pair.loser]
        if any(is_latent(name) for name in names):
            raise ValueError(f"line {pair.line}: latents are no plain files that others read; store pictures")
        if pair.reference:
            raise ValueError(f"line {pair.line}: it has a reference picture, for which Pick-a-Pic has no column")
        label = 0.5 if pair.certainty == 0 else float(number % 2 == 0)
        folder = inside(preferences.folder)
        yield pair, [folder / name for name in (names[::-1] if number % 2 else names)], label


def write_folder(preferences: Preferences, target: Path) -> int:
    """The pairs as a folder with train/metadata.jsonl; how many. ValueError for latents."""
    lines, folder = [], inside(target.parent) / target.name  # which a stranger may have made a link

    for pair, paths, label in _rows_out(preferences):
        names = [keep_file(folder / "train", path.read(MOST_BYTES), path.path.suffix.lower()) for path in paths]
        row = {"caption": pair.prompt, "jpg_0_file_name": names[0], "jpg_1_file_name": names[1]}
        lines.append(json.dumps({**row, "label_0": label, "label_1": 1 - label}) + "\n")
    (folder / METADATA).write("".join(lines).encode())
    return len(lines)


def write_parquet(preferences: Preferences, target: Path) -> int:
    """The pairs as one parquet file with the pictures in it; how many. ValueError for latents, ImportError as above."""
    arrow = _pyarrow()
    picture = arrow.binary()
    schema = arrow.schema(
        {"caption": arrow.string(), "jpg_0": picture, "jpg_1": picture, "label_0": arrow.float64(),
         "label_1": arrow.float64()}
    )  # fmt: skip
    count, rows = 0, []
    file = inside(target.parent) / target.name
    with file.fresh() as handle, arrow.parquet.ParquetWriter(handle, schema) as writer:
        for pair, paths, label in _rows_out(preferences):
            first, second = (path.read(MOST_BYTES) for path in paths)
            rows.append(
                {"caption": pair.prompt, "jpg_0": first, "jpg_1": second, "label_0": label, "label_1": 1 - label}
            )
            if len(rows) == ROWS:
                writer.write_table(arrow.Table.from_pylist(rows, schema))
                count, rows = count + len(rows), []
        writer.write_table(arrow.Table.from_pylist(rows, schema))
    return count + len(rows)
