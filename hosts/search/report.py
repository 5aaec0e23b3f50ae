"""What a search found as a picture: the best reward against network calls, its tree, and the best few beneath."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ...files.pictures import as_image, rounded
from ...sampling.find import Find
from ...sampling.search import State
from ...sampling.tree import Tree
from . import tree_picture

if TYPE_CHECKING:
    import PIL.Image

WIDTH, HEIGHT, LEFT, MARGIN = 640, 260, 64, 26
SIDE, GAP, LABEL = 144, 8, 18
PAPER, GRID, INK = (24, 26, 30), (58, 62, 70), (205, 210, 218)
LINE, MEAN, BEST = (110, 180, 255), (255, 150, 90), (130, 215, 140)


def thumbnail(image: Tensor) -> PIL.Image.Image:
    """An image (H, W, 3), or the first of a video (T, H, W, 3), in [0, 1], small enough for the report."""
    from PIL import Image

    small = Image.fromarray(rounded(image if image.ndim == 3 else image[0]).numpy())
    scale = SIDE / max(small.size)
    return small.resize((max(1, round(small.width * scale)), max(1, round(small.height * scale))))


def draw(state: State, pictures: Sequence[PIL.Image.Image], title: str, rows: int) -> Tensor:
    """(1, H, W, 3) in [0, 1]. pictures: thumbnails of the state's best, best first.

    rows: of thumbnails, of which there is room for four in each; reports of one method with equal rows have one size.
    """
    from PIL import Image, ImageDraw

    best = state.best.found
    below = HEIGHT + (tree_picture.HEIGHT if isinstance(state, Tree) else 0)
    image = Image.new("RGB", (WIDTH, below + rows * (SIDE + LABEL + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(image)
    means = state.means if isinstance(state, Find) else ()
    _curve(pen, state.best.history, means, max(state.ledger.calls, 1), title)
    if isinstance(state, Tree):
        tree_picture.draw(pen, state, HEIGHT, WIDTH, [c.number for c in best])
    for i, (small, candidate) in enumerate(zip(pictures, best, strict=True)):
        left = GAP + i % 4 * (WIDTH - GAP) // 4
        top = below + i // 4 * (SIDE + LABEL + GAP)
        image.paste(small, (left, top))
        pen.text((left, top + SIDE + 3), f"{i + 1}.  {spelt(candidate.reward)}", fill=BEST if i == 0 else INK)
    return as_image(image)


def spelt(reward: float) -> str:
    """A reward to four digits, in decimals: -0.0000026 and not -2.6e-06."""
    return np.format_float_positional(float(f"{reward:.4g}"), trim="-") if math.isfinite(reward) else str(reward)


def _curve(
    pen: Any, history: Sequence[tuple[int, float]], means: Sequence[tuple[int, float]], calls: int, title: str
) -> None:
    right, top, bottom = WIDTH - 14, MARGIN, HEIGHT - 34
    values = [reward for _, reward in (*history, *means)] or [0.0]
    low, high = min(values), max(values)
    if high == low:
        low, high = low - 0.5, high + 0.5

    def place(spent: int, reward: float) -> tuple[float, float]:
        share = (reward - low) / (high - low)
        return LEFT + min(1.0, spent / calls) * (right - LEFT), bottom - share * (bottom - top)

    for k in range(5):
        y = top + k * (bottom - top) / 4
        label = f"{high - k * (high - low) / 4:.3g}"
        pen.line([(LEFT, y), (right, y)], fill=GRID)
        pen.text((max(2, LEFT - 6 - 6 * len(label)), y - 6), label, fill=INK)
    pen.text((LEFT, 6), title, fill=INK)
    pen.text((LEFT, bottom + 5), "0", fill=INK)
    pen.text((right - 6 * len(str(calls)) - 40, bottom + 5), f"{calls} calls", fill=INK)
    if len(means) > 1:
        pen.line([place(*mean) for mean in means], fill=MEAN, width=2)
        pen.text((LEFT + 60, bottom + 5), "mean of each step", fill=MEAN)
    # The best stays what it was until a better one is found: a staircase.
    points: list[tuple[float, float]] = []
    for spent, reward in history:
        x, y = place(spent, reward)
        points += [(x, points[-1][1] if points else y), (x, y)]
    if points:
        points.append((right, points[-1][1]))
        pen.line(points, fill=LINE, width=2)
