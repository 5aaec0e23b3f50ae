"""Covers a picture with overlapping tiles and blends what is made of them, without a weight map and without seams.

Tiles lie on a grid, evenly spread, so that every overlap is at least the one asked for. Windows are products of one
along each axis, and are normalised along the axes before anything is blended: weights add up to one at every pixel, a
constant stays constant, and memory is that of one tile beside the result. "gaussian": variance 0.01 of the squared
side, as in Barbero Jimenez 2023, "Mixture of Diffusers" (arXiv 2302.02412), section 3. "cosine": one inside, nothing
in the outer quarter of an overlap, where a network missed its neighbours, and a squared sine between; a process whose
reach is no more than that quarter gives in tiles exactly what it gives for the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..sampling.settings import Settings, setting

Window = Literal["gaussian", "cosine"]
Span = tuple[int, int]
# Of the side squared: at a tile's edge the weight is exp(-12.5) of that in its middle.
_VARIANCE = 0.01


@dataclass(frozen=True)
class Tiling(Settings):
    """How a picture is cut. tile: side of the squares in pixels, 0 for one tile however large the picture is.

    overlap: least common width of neighbours, at most half a tile.
    """

    tile: int = setting(512, 0, 8192, step=64, remedy="0 is no tiles",
        help="Side of the tiles in pixels of the result, the size that the restorer knows; 0 is none.",
        page="Side of the tiles, in pixels of the result; best what the restorer was trained on. 0: no tiles.")
    overlap: int = setting(64, 0, 4096, step=8, remedy="an eighth of the tile is usual",
        help="Width that neighbouring tiles share, at most half a tile. More hides more and costs more.")
    window: Window = setting("gaussian", advanced=True,
        help="How tiles are blended. gaussian: softest. cosine: leaves out their rims, seen least well.",
        page="How tiles are blended. gaussian: every pixel leans to the tile whose middle is nearest. cosine: the "
        "outer quarter of each overlap is left out, where the model saw least, and the rest is faded.")

    def check(self) -> None:
        """See the base."""
        if self.tile and self.overlap > self.tile // 2:
            raise ValueError(
                f"overlap {self.overlap} must be between 0 and {self.tile // 2}, half of the tile ({self.tile}): "
                "an eighth of it is usual"
            )


def spans(length: int, tile: int, overlap: int) -> list[Span]:
    """(begin, end) of the fewest spans of `tile` that cover a length, evenly spread; one whole span where it fits."""
    if tile == 0 or length <= tile:
        return [(0, length)]
    count = math.ceil((length - overlap) / (tile - overlap))
    begins = [round(i * (length - tile) / (count - 1)) for i in range(count)]
    return [(begin, begin + tile) for begin in begins]


def weights(along: Sequence[Span], overlap: int, window: Window) -> list[Tensor]:
    """A weight for each pixel of each span, fp32; over all spans they add up to one at every pixel."""
    length = along[-1][1]
    raw = [_raw(b, e, b > 0, e < length, overlap, window) for b, e in along]
    total = torch.zeros(length, dtype=torch.float64)
    for (b, e), own in zip(along, raw, strict=True):
        total[b:e] += own
    return [(own / total[b:e]).float() for (b, e), own in zip(along, raw, strict=True)]


def _raw(begin: int, end: int, before: bool, after: bool, overlap: int, window: Window) -> Tensor:
    place = torch.arange(end - begin, dtype=torch.float64) + 0.5
    if window == "gaussian":
        return torch.exp(-((place / (end - begin) - 0.5) ** 2) / (2 * _VARIANCE))
    quarter = overlap // 4
    ramp = max(overlap - 2 * quarter, 1)
    own = torch.ones_like(place)
    # A side that is the picture's own border has no neighbour to hand over to.
    for there, distance in ((before, place), (after, place.flip(0))):
        if there and overlap:
            own = own * torch.sin(((distance - quarter) / ramp).clamp(0, 1) * (math.pi / 2)) ** 2
    return own


@dataclass(frozen=True)
class Grid:
    """The tiles of one size of picture, row by row from the top left.

    boxes: (top, bottom, left, right) of each.
    """

    height: int
    width: int
    tiling: Tiling
    boxes: tuple[tuple[int, int, int, int], ...] = field(init=False)
    _down: list[Tensor] = field(init=False, repr=False, compare=False)
    _across: list[Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"a picture of {self.width} x {self.height} pixels has nothing to cover with tiles")
        cut = self.tiling
        rows, columns = (spans(side, cut.tile, cut.overlap) for side in (self.height, self.width))
        object.__setattr__(self, "boxes", tuple((*row, *column) for row in rows for column in columns))
        object.__setattr__(self, "_down", weights(rows, cut.overlap, cut.window))
        object.__setattr__(self, "_across", weights(columns, cut.overlap, cut.window))

    def __len__(self) -> int:
        return len(self.boxes)

    def add(self, canvas: Tensor, index: int, tile: Tensor) -> None:
        """Blend a tile (B, h, w, C) into the canvas (B, H, W, C), which begins at zero and needs every tile once."""
        top, bottom, left, right = self.boxes[index]
        down = self._down[index // len(self._across)].to(canvas)[:, None, None]
        across = self._across[index % len(self._across)].to(canvas)[:, None]
        canvas[:, top:bottom, left:right] += tile.to(canvas) * down * across
