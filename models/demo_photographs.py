"""The photographs that come with Retort: two on which nothing was trained. Origins: models/README.md."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..files.pictures import decode_opaque

_FOLDER = Path(__file__).parent / "pictures"
NAMES = ("cat", "coffee")


def photograph(name: str) -> Tensor:
    """One of NAMES as an IMAGE (1, H, W, 3) in [0, 1]. ValueError for another name."""
    if name not in NAMES:
        raise ValueError(f"there is no photograph {name!r}; choose {' or '.join(NAMES)}")
    return decode_opaque((_FOLDER / f"{name}.jpg").read_bytes())[None]
