"""Inputs that the restoration nodes share, and the settings made of them."""

from __future__ import annotations

from ..hosts.api import restoration
from ..restoration.tiles import WINDOWS, Tiling
from .inputs import number

CATEGORY = "image/restoration/retort"
ALIASES = ["retort", "restore", "restoration", "upscale", "super resolution", "instarevive", "enhance", "deblur"]
SAME = "The same as at Restore, so that the tiles are the same."


def size_inputs(tooltip: str = "") -> list:
    """scale, tile, overlap and least_side. tooltip: in place of what they mean to Restore."""
    return [
        number(
            "scale", 4.0, 0.1, 16.0,
            tooltip or "Sides of the result over those of the image; 1 restores at the same size.",
            step=0.1, round=0.001,
        ),
        number(
            "tile", 512, 0, 8192,
            tooltip or "Side of the tiles in pixels of the result, the size that the restorer knows; 0 is none.",
            step=64,
        ),
        number(
            "overlap", 64, 0, 4096,
            tooltip or "Width that neighbouring tiles share, at most half a tile. More hides more and costs more.",
            step=8,
        ),
        number(
            "least_side", 0, 0, 8192,
            tooltip
            or "The shorter side is worked on at no less than this, then made smaller; 512 is InstaRevive's, 0 off.",
            step=64, advanced=True,
        ),
    ]


def size_of(scale: float, tile: int, overlap: int, least_side: int, window: str = WINDOWS[0]) -> restoration.Size:
    """How a picture is enlarged and cut. ValueError naming the input."""
    return restoration.Size(scale, Tiling(tile, overlap, window), least_side)  # type: ignore[arg-type]
