"""Pictures to learn restoration from: each damaged by a degradation of its own draw, and brought back to its size.

The degradations are `degradation`'s. How hard each picture is hit is drawn here, so that one restorer serves light and
heavy damage; InstaRevive (arXiv 2504.15513) trains at Real-ESRGAN's full ranges and a shrinking factor of 4 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sampling.accounts import seed_of
from ..sampling.settings import Settings, setting
from .degradation import Degradation, Face, Infrared, RealWorld, degrade

Kind = Literal["real_world", "face", "infrared"]


@dataclass(frozen=True)
class Spoiling(Settings):
    """How pictures are damaged.

    degradation: which kind. weakest, strongest: strength of real_world, 1 being the published ranges (the other kinds
    have one strength). least, most: the size that is lost, as input over output.
    """

    degradation: Kind = setting("real_world",
        help="How the pictures are damaged, anew in every step; Degrade shows each kind.",
        page="How pictures are damaged, anew in every step, as *Degrade* shows: real_world (Real-ESRGAN's two stages), "
        "face (GFPGAN's single one), infrared (blur and sensor noise).")
    weakest: float = setting(0.3, 0, 1, step=0.05,
        help="real_world: the least strength that is drawn, of the published one.",
        page="real_world: the least strength that is drawn, as a share of the published ranges.")
    strongest: float = setting(1.0, 0, 1, step=0.05, help="real_world: the greatest such strength.",
        page="real_world: the greatest such strength. 0.3 and 1 serve light and heavy damage with one LoRA.")
    least: float = setting(2.0, 1, 64, step=0.5, help="Least factor by which pictures are shrunk.")
    most: float = setting(4.0, 1, 64, step=0.5, help="Greatest such factor; what you will restore.",
        page="The greatest: the enlargement that *Restore* can be asked for.")

    def check(self) -> None:
        """See the base."""
        for low, high, usual in (("weakest", "strongest", "0.3 and 1"), ("least", "most", "2 and 4")):
            if not getattr(self, low) <= getattr(self, high):
                raise ValueError(
                    f"{low} is {getattr(self, low)!r} and {high} {getattr(self, high)!r}: {high} must be no smaller; "
                    f"{usual} are usual"
                )

    def drawn(self, seed: int) -> Degradation:
        """The degradation of one picture."""
        generator = torch.Generator().manual_seed(seed_of(seed, "strength"))
        strength, size = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        if self.degradation == "face":
            return Face(shrink=(self.least, self.most))
        # As evenly over factors as over their inverses.
        shrink = self.least * (self.most / self.least) ** size
        if self.degradation == "infrared":
            return Infrared(shrink=shrink)
        return RealWorld(shrink=shrink, strength=self.weakest + (self.strongest - self.weakest) * strength)

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
