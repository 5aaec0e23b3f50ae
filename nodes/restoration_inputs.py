"""Inputs that the restoration nodes share, and the settings made of them."""

from __future__ import annotations

from typing import Any

from ..hosts.api import restoration
from ..restoration.tiles import Tiling, Window
from ..sampling.settings import declared
from .checks import Asked
from .inputs import input_of

CATEGORY = "image/restoration/retort"
ALIASES = ["retort", "restore", "restoration", "upscale", "super resolution", "instarevive", "enhance", "deblur"]
SIZE = {**declared(restoration.Size), **declared(Tiling)}


def size_inputs(**changes: Any) -> list[Any]:
    """scale, tile, overlap and least_side. changes: arguments of all four inputs."""
    return [input_of(SIZE[name], changes) for name in ("scale", "tile", "overlap", "least_side")]


def size_of(
    scale: float, tile: int, overlap: int, least_side: int, window: Window = SIZE["window"].default
) -> restoration.Size:
    """How a picture is enlarged and cut. ValueError naming the input."""
    return restoration.Size(scale, Tiling(tile, overlap, window), least_side)


def check_size(given: Asked) -> None:
    """ValueError naming the input, where the size is known."""
    names = ("scale", "tile", "overlap", "least_side")
    if given.knows(*names):
        size_of(*(given[name] for name in names))
