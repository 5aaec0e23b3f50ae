"""Pictures to learn restoration from: each damaged by a degradation of its own draw, and brought back to its size.

The degradations are `degradation`'s. How hard each picture is hit is drawn here, so that one restorer serves light and
heavy damage; InstaRevive (arXiv 2504.15513) trains at Real-ESRGAN's full ranges and a shrinking factor of 4 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sampling.accounts import seed_of
from .degradation import Degradation, Face, Infrared, RealWorld, degrade, weaken

Kind = Literal["real_world", "face", "infrared"]


@dataclass(frozen=True)
class Spoiling:
    """How pictures are damaged.

    kind: which degradation. weakest, strongest: strength of real_world, 1 being the published ranges (the other kinds
    have one strength). least, most: the size that is lost, as input over output.
    """

    kind: Kind = "real_world"
    weakest: float = 0.3
    strongest: float = 1.0
    least: float = 2.0
    most: float = 4.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if not 0 <= self.weakest <= self.strongest <= 1:
            raise ValueError(
                f"weakest and strongest must rise within 0 to 1, got {self.weakest!r} and {self.strongest!r}: 0.3 and 1"
            )
        if not (math.isfinite(self.most) and 1 <= self.least <= self.most <= 64):
            raise ValueError(f"least and most must rise within 1 to 64, got {self.least!r} and {self.most!r}: 2 and 4")

    def drawn(self, seed: int) -> Degradation:
        """The degradation of one picture."""
        generator = torch.Generator().manual_seed(seed_of(seed, "strength"))
        strength, size = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        if self.kind == "face":
            return Face(shrink=(self.least, self.most))
        # As evenly over factors as over their inverses.
        shrink = self.least * (self.most / self.least) ** size
        if self.kind == "infrared":
            return Infrared(shrink=shrink)
        return weaken(RealWorld(shrink=shrink), self.weakest + (self.strongest - self.weakest) * strength)

    def __call__(self, images: Tensor, seeds: Sequence[int]) -> Tensor:
        """Images (B, H, W, 3) in [0, 1], each damaged by its own seed -> (B, H, W, 3) in [0, 1]."""
        made = [degrade(image[None], self.drawn(seed), seed) for image, seed in zip(images, seeds, strict=True)]
        return torch.cat([enlarged(image, images.shape[1], images.shape[2]) for image in made])


def enlarged(images: Tensor, height: int, width: int) -> Tensor:
    """Images (B, h, w, 3) at another size by bicubic interpolation, in [0, 1]: what a restorer is handed."""
    if images.shape[1:3] == (height, width):
        return images
    resized = F.interpolate(images.movedim(-1, 1), size=(height, width), mode="bicubic", align_corners=False)
    return resized.clamp(0, 1).movedim(1, -1)
