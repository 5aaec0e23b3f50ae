"""A run's log as a picture: one panel for each number, raw values pale, their running mean strong."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..files.pictures import as_image

# The order in which panels appear; everything else in the log follows by name.
FIRST = ("student_loss", "fake_loss")
LEFT_OUT = {"step", "seconds", "data", "memory", "card", "rate"}
WIDTH, HEIGHT, MARGIN, TITLE = 480, 220, 48, 22
PAPER, GRID, INK = (24, 26, 30), (58, 62, 70), (205, 210, 218)
COLOURS = ((110, 180, 255), (255, 150, 90), (130, 215, 140), (225, 130, 220), (240, 210, 100), (150, 160, 255))


def names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Numbers that the log has, in the order of their panels."""
    found = {key for row in rows for key, value in row.items() if isinstance(value, int | float)} - LEFT_OUT
    return [n for n in FIRST if n in found] + sorted(found - set(FIRST))


def smooth(values: Sequence[float], window: float) -> list[float]:
    """Running mean with a memory of `window` steps, unbiased at the beginning (Adam's correction)."""
    keep = 1 - 1 / max(1.0, window)
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight)
    return out


def draw(rows: Sequence[Mapping[str, Any]], window: float = 25, log: bool = False, most: int = 8) -> Tensor:
    """(1, H, W, 3) in [0, 1]: up to `most` panels, two in a row. ValueError when the log is empty."""
    from PIL import Image, ImageDraw

    chosen = names(rows)[:most]
    if not chosen:
        raise ValueError("the run's log holds no numbers yet: let it make a step first")
    columns = min(2, len(chosen))
    lines = -(-len(chosen) // columns)
    image = Image.new("RGB", (columns * WIDTH, lines * HEIGHT), PAPER)
    pen = ImageDraw.Draw(image)
    for i, name in enumerate(chosen):
        points = [(row["step"], float(row[name])) for row in rows if isinstance(row.get(name), int | float)]
        corner = (i % columns * WIDTH, i // columns * HEIGHT)
        _panel(pen, corner, name, points, window, log, COLOURS[i % len(COLOURS)])
    return as_image(image)


def _panel(pen: Any, corner: tuple[int, int], name: str, points: list[tuple[int, float]], window, log, colour) -> None:
    left, top = corner[0] + MARGIN + 12, corner[1] + TITLE
    right, bottom = corner[0] + WIDTH - 12, corner[1] + HEIGHT - 24
    steps, values = [p[0] for p in points], [p[1] for p in points]
    log = log and min(values) > 0
    shown = [math.log10(v) for v in values] if log else values
    ordered = sorted(shown)
    # A single spike must not flatten the rest.
    low, high = ordered[len(ordered) // 200], ordered[-1 - len(ordered) // 200]
    if high == low:
        low, high = low - 0.5, high + 0.5
    first, last = steps[0], max(steps[-1], steps[0] + 1)

    def place(step: int, value: float) -> tuple[float, float]:
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return left + (step - first) / (last - first) * (right - left), bottom - share * (bottom - top)

    for k in range(5):
        y = top + k * (bottom - top) / 4
        value = high - k * (high - low) / 4
        pen.line([(left, y), (right, y)], fill=GRID)
        label = f"{10**value if log else value:.3g}"
        pen.text((left - 6 - 6 * len(label), y - 6), label, fill=INK)
    pen.text((left, corner[1] + 5), f"{name}{' (log)' if log else ''}   last {values[-1]:.4g}", fill=INK)
    pen.text((left, bottom + 6), str(first), fill=INK)
    pen.text((right - 6 * len(str(steps[-1])), bottom + 6), str(steps[-1]), fill=INK)
    pale = tuple((a + 2 * b) // 3 for a, b in zip(colour, PAPER, strict=True))
    for curve, fill, width in ((shown, pale, 1), (smooth(shown, window), colour, 2)):
        line = [place(s, v) for s, v in zip(steps, curve, strict=True)]
        if len(line) > 1:
            pen.line(line, fill=fill, width=width)
        else:
            pen.ellipse([line[0][0] - 2, line[0][1] - 2, line[0][0] + 2, line[0][1] + 2], fill=fill)
