"""Watching a run: one line of numbers a step, pictures now and then, and whoever wants to see or stop it."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .files import write_atomically
from .log_file import METRICS as METRICS
from .log_file import Row, end_of, read_rows


class Watcher(Protocol):
    """Someone who looks at a run; called each step, so it must be quick."""

    def check(self) -> None:
        """Raise whatever ends the run; called between batches too."""
        ...

    def wishes(self) -> set[str]:
        """What was asked for since the last step: any of "save", "sample", "stop"."""
        ...

    def step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """A step is done."""
        ...

    def preview(self, images: Tensor, done: int, path: Path) -> None:
        """Pictures (B, H, W, 3) in [0, 1] of the student as it is now, also written to `path`."""
        ...

    def says(self, text: str) -> None:
        """A sentence about what happens now."""
        ...


class Silent:
    """Nobody looks."""

    def check(self) -> None:
        """Nothing ends the run."""

    def wishes(self) -> set[str]:
        """Nothing is asked for."""
        return set()

    def step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Nobody counts."""

    def preview(self, images: Tensor, done: int, path: Path) -> None:
        """Nobody looks."""

    def says(self, text: str) -> None:
        """Nobody listens."""


class Metrics:
    """The log of a run, one JSON object a line; a line that a crash cut off is left out when it is read."""

    def __init__(self, folder: Path, done: int):
        """Open the log of a run that has `done` steps; lines beyond them are from a lost attempt and go."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = path = folder / METRICS
        if path.is_file():
            with open(path, "r+b") as handle:
                handle.truncate(end_of(handle, done))
        self._handle = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
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


def read_metrics(path: Path) -> list[Row]:
    """Every row of a log, in order of steps; empty when there is none."""
    return list(read_rows(path))


def save_sheet(images: Tensor, path: Path) -> None:
    """A contact sheet of pictures (B, H, W, 3) in [0, 1], up to eight in a row, as PNG."""
    import io

    from PIL import Image

    columns = min(8, len(images))
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    b, h, w = len(images), *images.shape[1:3]
    sheet = images.new_zeros(len(rows) * h, columns * w, 3)
    for i in range(b):
        top, left = i // columns * h, i % columns * w
        sheet[top : top + h, left : left + w] = images[i]
    pixels = (sheet.clamp(0, 1) * 255).round().byte().cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def latest_preview(folder: Path) -> Path | None:
    """The newest contact sheet of a run, None before the first."""
    found = sorted((folder / "previews").glob("step_*.png"))
    return found[-1] if found else None


def open_picture(path: Path) -> Any:
    """A picture as PIL image, read whole."""
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def read_picture(path: Path | None) -> Tensor:
    """A picture as IMAGE (1, H, W, 3) in [0, 1]; a black one of 64 x 64 where there is none yet."""
    if path is None:
        return torch.zeros(1, 64, 64, 3)
    image = open_picture(path)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(1, image.height, image.width, 3).float() / 255
