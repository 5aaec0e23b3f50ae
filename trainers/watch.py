"""Watching a run: one line of numbers a step, pictures now and then, and whoever wants to see or stop it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..files.atomic import write_atomically
from ..files.folder import Inside, inside
from ..files.log_file import METRICS as METRICS
from ..files.log_file import Row, end_of, read_rows
from ..files.pictures import as_image, rounded

PICTURE_BYTES = 2**27  # of a contact sheet


class Watcher(Protocol):
    """Someone who looks at a run; called each step, so it must be quick."""

    def check(self) -> None:
        """Raise whatever ends the run; called between batches too."""
        ...

    def commands(self) -> set[str]:
        """What was asked for since the last step: any of "save", "sample", "stop"."""
        ...

    def step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""
        ...

    def preview(self, images: Tensor, done: int, path: Inside) -> None:
        """Pictures (B, H, W, 3) in [0, 1] of the student as it is now, also written to `path`."""
        ...

    def says(self, text: str) -> None:
        """A sentence about what happens now."""
        ...

    def phase(self, name: str, done: int, total: int) -> None:
        """How far a part of the run has come that is not counted in its steps, such as drawing pairs to copy."""
        ...


class Silent:
    """Nobody looks."""

    def check(self) -> None:
        """Nothing ends the run."""

    def commands(self) -> set[str]:
        """Nothing is asked for."""
        return set()

    def step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Nobody counts."""

    def preview(self, images: Tensor, done: int, path: Inside) -> None:
        """Nobody looks."""

    def says(self, text: str) -> None:
        """Nobody listens."""

    def phase(self, name: str, done: int, total: int) -> None:
        """Nobody counts."""


class Metrics:
    """The log of a run, one JSON object a line; a line that a crash cut off is left out when it is read."""

    def __init__(self, folder: Path | Inside, done: int):
        """Open the log of a run that has `done` steps; lines beyond them are from a lost attempt and go."""
        self._path = inside(folder) / METRICS
        log = self._path.appending()
        log.truncate(end_of(log, done))
        self._handle = io.TextIOWrapper(io.BufferedWriter(log), encoding="utf-8")
        self._flushed = 0.0

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """One line."""
        self._handle.write(_line({"step": step, **values}))
        # Whoever watches the file sees it twice a second; a file system need not hear of each step.
        if time.monotonic() - self._flushed > 0.5:
            self.flush()

    def flush(self) -> None:
        """Hand all lines to the file system. OSError names the file."""
        try:
            self._handle.flush()
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self._path}: {error.strerror}; free space") from error
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Finish the log."""
        with contextlib.suppress(OSError):  # a full disk must not hide the error that ended the run
            self._handle.close()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({k: _short(v) for k, v in row.items()}) + "\n"


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def read_metrics(path: Path | Inside) -> list[Row]:
    """Every row of a log, in order of steps; empty when there is none."""
    return list(read_rows(path))


def columns_of(count: int) -> int:
    """How many of so many pictures stand in a row of their contact sheet: about as many as there are rows."""
    least = math.ceil(math.sqrt(count))
    # Whole rows, where that makes none of more than twice as many as there are rows.
    return next((n for n in range(least, math.isqrt(4 * count) + 1) if count % n == 0), least)


def save_sheet(images: Tensor, path: Path | Inside) -> None:
    """A contact sheet of pictures (B, H, W, 3) in [0, 1], `columns_of(B)` in a row, as PNG."""
    from PIL import Image

    columns = columns_of(len(images))
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    b, h, w = len(images), *images.shape[1:3]
    sheet = images.new_zeros(len(rows) * h, columns * w, 3)
    for i in range(b):
        top, left = i // columns * h, i % columns * w
        sheet[top : top + h, left : left + w] = images[i]
    buffer = io.BytesIO()
    Image.fromarray(rounded(sheet).numpy()).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def checkpoints(folder: Path | Inside) -> list[Inside]:
    """The LoRAs that a run has kept so far, the earliest first."""
    kept = inside(folder) / "checkpoints"
    return [kept / name for name in kept.files() if name.startswith("step_") and name.endswith(".safetensors")]


def latest_preview(folder: Path | Inside) -> Inside | None:
    """The newest contact sheet of a run, None before the first."""
    previews = inside(folder) / "previews"
    found = [name for name in previews.files() if name.startswith("step_") and name.endswith(".png")]
    return previews / found[-1] if found else None


def open_picture(path: Inside) -> Any:
    """A picture as PIL image, read whole. ValueError for what is none."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(path.read(PICTURE_BYTES)), formats=["PNG"]) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the picture {path} cannot be read ({error}): delete it") from error


def read_picture(path: Inside | None) -> Tensor:
    """A picture as IMAGE (1, H, W, 3) in [0, 1]; a black one of 64 x 64 where there is none yet."""
    if path is None:
        return torch.zeros(1, 64, 64, 3)
    return as_image(open_picture(path))
