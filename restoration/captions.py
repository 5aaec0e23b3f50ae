"""Captions for restoration: what a captioner is, what of its words is used, and which caption belongs to which tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

# The longest text encoders of restorers read 300 tokens; more is a captioner that does not stop.
LONGEST = 2000


class Captioner(Protocol):
    """Says what pictures show."""

    def caption(self, images: Tensor) -> list[str]:
        """A caption of each of images (B, H, W, 3) in [0, 1]; any size."""
        ...


def cleaned(captions: Sequence[str], count: int) -> tuple[list[str], int]:
    """One line for each of `count` pictures, cut at LONGEST characters, and how many were cut.

    A captioner that says nothing leaves an empty line. ValueError for another number of captions.
    """
    if len(captions) != count:
        raise ValueError(f"the captioner gave {len(captions)} captions for {count} pictures: use another one")
    lines = [" ".join(text.split()) for text in captions]
    return [line[:LONGEST].rstrip() for line in lines], sum(len(line) > LONGEST for line in lines)


def per_image(text: str, count: int, each_line: bool) -> list[str]:
    """A caption for each of `count` images: the whole text for all, or one line each. ValueError for other counts."""
    if not each_line:
        return [cleaned([text], 1)[0][0]] * count
    lines = text.split("\n")
    if len(lines) != count:
        # A text that ends in a line break has no further caption.
        lines = lines[:-1] if len(lines) == count + 1 and not lines[-1].strip() else lines
    if len(lines) != count:
        raise ValueError(
            f"caption has {len(lines)} lines for {count} images: write one for each, or switch caption_per_line off"
        )
    return cleaned(lines, count)[0]


def per_tile(text: str, images: int, tiles: int) -> list[list[str]]:
    """[image][tile] of a text with a line for each tile, row by row, of all images or of each one after another.

    ValueError for another number of lines.
    """
    lines = text.split("\n")
    while len(lines) > tiles and not lines[-1].strip() and len(lines) != images * tiles:
        lines.pop()
    if len(lines) == tiles:
        return [cleaned(lines, tiles)[0]] * images
    if len(lines) != images * tiles:
        raise ValueError(
            f"tile_captions has {len(lines)} lines and there are {tiles} tiles in each of {images} images: give scale, "
            "tile, overlap and least_side of this node to the Caption node too, or clear tile_captions"
        )
    clean = cleaned(lines, len(lines))[0]
    return [clean[i * tiles : (i + 1) * tiles] for i in range(images)]
