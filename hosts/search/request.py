"""What a user wants searched, and what a search knows: the objects that pass between nodes, files and the search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...sampling.search import Config, State
from ...sampling.transition import Transition
from ..contract import LATENT, NOISE


@dataclass(frozen=True)
class Absent:
    """In place of a NOISE that a file cannot hold; its seed tells whether the one connected later is the same."""

    seed: int


@dataclass(frozen=True, eq=False)
class SearchRequest:
    """What is searched, the same in every run of one search.

    latent: a LATENT, empty or a picture, with its mask. noise: a NOISE that starts are drawn from, whose seed then
    counts; None draws them as core does. keep: how many of the best are given back. boundary: the level below which a
    second network goes on, as Wan 2.2's does; 0 for one network.
    """

    sigmas: Tensor
    latent: LATENT
    prompt: str
    config: Config
    transition: Transition
    seed: int
    noise: NOISE = None
    keep: int = 4
    boundary: float = 0.0


@dataclass(frozen=True, eq=False)
class Saved:
    """SEARCH_TREE: a search and what it knows of each item; None for one that was not begun. Never changed."""

    request: SearchRequest
    states: tuple[State | None, ...]


@dataclass(frozen=True, eq=False)
class Found:
    """best: LATENT, one for each item. top: LATENT, the best few of each item, best first. report: IMAGE."""

    best: dict[str, Any]
    top: dict[str, Any]
    saved: Saved
    report: Tensor
    text: str
