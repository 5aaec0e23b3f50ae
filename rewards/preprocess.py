"""Pictures as published reward models want them, in torch and with gradients, equal to PIL's within 1e-2.

PIL's bicubic has a = -0.5 and widens its kernel when it shrinks, as torch's does with antialias. PIL resizes across,
then down, and cuts and rounds to whole pixel values after each; we do not round, which is all that differs. (Pillow 13
goes down first where the height shrinks much more than the width. Published models were trained with what came before.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .scoring import checked

Fit = Literal["crop", "floor crop", "pad", "stretch"]
Resample = Literal["bicubic", "bilinear"]
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# PIL's numbers of its filters, which transformers' files hold.
_PIL = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Preprocess:
    """Resize to `size` pixels a side and normalise.

    fit: "crop" - the short side becomes `short` (None: size), then the middle is cut out, its corner rounded as
    torchvision does; "floor crop" - rounded down, as transformers does; "pad" - the long side becomes size, black
    around it; "stretch" - both become size.
    """

    size: int = 224
    fit: Fit = "floor crop"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resample: Resample = "bicubic"
    short: int | None = None

    def __post_init__(self) -> None:
        for name, choice, known in (("fit", self.fit, Fit), ("resample", self.resample, Resample)):
            if choice not in get_args(known):
                raise ValueError(f"{name} {choice!r} is not known; use one of {', '.join(get_args(known))}")
        if self.size < 1 or (self.short is not None and self.short < self.size):
            raise ValueError(f"size {self.size} must be at least 1, and short {self.short} at least size")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std} must be three numbers each, std above 0")

    def __call__(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) in [0, 1] -> (B, 3, size, size), normalised."""
        pixels = self.fitted(checked(images).movedim(-1, 1))
        mean, std = (pixels.new_tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std

    def fitted(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, size, size) in [0, 1]."""
        h, w = pixels.shape[-2:]
        size = self.size
        if self.fit == "stretch":
            return self._resized(pixels, size, size)
        if self.fit == "pad":
            scale = size / max(h, w)
            pixels = self._resized(pixels, max(1, round(h * scale)), max(1, round(w * scale)))
            down, right = size - pixels.shape[-2], size - pixels.shape[-1]
            return F.pad(pixels, (right // 2, right - right // 2, down // 2, down - down // 2))
        short = self.short or size
        tall, wide = (int(short * h / w), short) if h > w else (short, int(short * w / h))
        pixels = self._resized(pixels, tall, wide)
        top, left = (tall - size) / 2, (wide - size) / 2
        top, left = (int(top), int(left)) if self.fit == "floor crop" else (round(top), round(left))
        return pixels[..., top : top + size, left : left + size]

    def _resized(self, pixels: Tensor, h: int, w: int) -> Tensor:
        # Across, then down, as PIL does; bicubic overshoots at edges, and the bytes that PIL keeps of each pass cannot.
        for size in ((pixels.shape[-2], w), (h, w)):
            if pixels.shape[-2:] != size:
                pixels = F.interpolate(pixels, size, mode=self.resample, align_corners=False, antialias=True)
                pixels = pixels.clamp(0, 1)
        return pixels


CLIP = Preprocess()
IMAGE_REWARD = Preprocess(fit="crop")
HPS = Preprocess(fit="pad")


def from_settings(given: Mapping[str, Any]) -> Preprocess:
    """A Preprocess from the settings of an image processor of transformers (its preprocessor_config.json).

    ValueError for settings that say something else than resize, centre crop, and normalise.
    """
    size, crop = given.get("size"), given.get("crop_size")
    if not given.get("do_resize", True) or not isinstance(size, Mapping):
        raise ValueError(f"its image processor has size {size!r}, which is not one for every picture")
    mean, std = given.get("image_mean") or (0, 0, 0), given.get("image_std") or (1, 1, 1)
    if not given.get("do_normalize", True):
        mean, std = (0, 0, 0), (1, 1, 1)
    if abs(given.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-6 or not given.get("do_rescale", True):
        raise ValueError(f"its image processor scales by {given.get('rescale_factor')!r} instead of 1/255")
    resample = given.get("resample", 2)
    if int(resample) not in _PIL:
        raise ValueError(f"its image processor resizes with PIL's filter {int(resample)}, not bicubic or bilinear")
    common: dict[str, Any] = {"mean": tuple(mean), "std": tuple(std), "resample": _PIL[int(resample)]}
    cuts = given.get("do_center_crop", crop is not None)
    if "shortest_edge" in size and cuts and crop is not None:
        side = crop["height"] if isinstance(crop, Mapping) else int(crop)
        # Some processors (ConvNeXt's) give the cut as a share of the resized picture.
        return Preprocess(side, "floor crop", short=int(size["shortest_edge"]), **common)
    if size.get("height") is not None and size.get("height") == size.get("width"):
        return Preprocess(int(size["height"]), "stretch", **common)
    raise ValueError(f"its image processor has size {dict(size)} and crop {crop!r}, which do not make a square")


def to_bytes(images: Tensor) -> Tensor:
    """(B, H, W, 3) in [0, 1] -> whole pixel values as uint8 on the CPU."""
    return (checked(images).detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
