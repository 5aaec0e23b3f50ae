"""The photographs that the photograph model learns from and is measured on, whole ones held out, and patches of them.

They lie inside scikit-image and scikit-learn; nothing is downloaded. Origins and licences are in README.md beside this
file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..restoration.degradation import RealWorld, degrade
from ..restoration.spoil import enlarged
from ..sampling.accounts import seed_of

SIDE = 96  # of the patches that are degraded; what is learnt from them is cut out of their middle part
LEVELS = (1.0, 0.7, 0.5, 0.35)


@dataclass(frozen=True)
class Photograph:
    """Where a photograph comes from, what it shows (phrases), how often it is drawn, and its sharpest useful scale."""

    source: str
    caption: str
    weight: float = 1.0
    sharpest: float = 1.0


# "skimage" names are functions of skimage.data, the others files of sklearn.datasets.load_sample_image.
TRAINING = {
    "astronaut": Photograph("skimage", "colour photograph, woman, face, orange cloth, flag, machine", 2.0),
    "motorcycle": Photograph("skimage", "colour photograph, red machine, metal, wood", 3.0),
    "china": Photograph("china.jpg", "colour photograph, building, roof, tree, leaves, water, sky", 2.0, 0.7),
    "flower": Photograph("flower.jpg", "colour photograph, orange flower, dark green leaves", 2.0, 0.7),
    "brick": Photograph("skimage", "black and white photograph, wall of bricks"),
    "grass": Photograph("skimage", "black and white photograph, grass, leaves"),
    "gravel": Photograph("skimage", "black and white photograph, stones"),
    "coins": Photograph("skimage", "black and white photograph, coins, metal, face"),
    "moon": Photograph("skimage", "black and white photograph, moon, grey stones", 0.5),
    "page": Photograph("skimage", "black and white photograph, paper with text", 0.7),
    "text": Photograph("skimage", "black and white photograph, paper with handwriting", 0.3),
    "immunohistochemistry": Photograph("skimage", "colour photograph, brown and blue tissue, cells"),
    "retina": Photograph("skimage", "colour photograph, red eye, orange tissue", 0.5, 0.7),
    "hubble_deep_field": Photograph("skimage", "colour photograph, stars in a dark night sky", 0.5, 0.7),
}
HELD_OUT = {
    "camera": Photograph("skimage", "black and white photograph, man with a machine on grass, building, sky"),
    "chelsea": Photograph("skimage", "colour photograph, face of an animal, brown fur"),
    "coffee": Photograph("skimage", "colour photograph, red and white, brown wood, metal"),
    "rocket": Photograph("skimage", "colour photograph, machine, dark blue night sky"),
}


@cache
def load(name: str) -> Tensor:
    """A photograph (H, W, 3) in [0, 1]; ImportError naming the extra where scikit-image or scikit-learn is missing."""
    photograph = (TRAINING | HELD_OUT)[name]
    try:
        if photograph.source == "skimage":
            from skimage import data

            pixels = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
        else:
            from sklearn.datasets import load_sample_image

            pixels = load_sample_image(photograph.source)
    except ImportError as error:
        raise ImportError('the photographs need scikit-image and scikit-learn: pip install "retort[test]"') from error
    image = torch.from_numpy(pixels.copy()).float() / 255
    return image[..., None].expand(-1, -1, 3) if image.ndim == 2 else image


@cache
def pyramid(name: str) -> list[Tensor]:
    """A training photograph (3, H, W) at its useful scales, all at least SIDE a side."""
    image = load(name).movedim(-1, 0)[None]
    found = []
    for level in LEVELS:
        if level <= TRAINING[name].sharpest and min(image.shape[2:]) * level >= SIDE:
            scaled = F.interpolate(image, scale_factor=level, mode="bicubic", antialias=True) if level < 1 else image
            found.append(scaled[0].clamp(0, 1))
    return found


def turned(images: Tensor, way: int) -> Tensor:
    """(..., H, W) in one of the eight ways to turn and mirror it."""
    return torch.rot90(images.flip(-1) if way >= 4 else images, way % 4, (-2, -1))


def patch(generator: torch.Generator, side: int) -> tuple[Tensor, int]:
    """A random patch (3, side, side) in [0, 1] of the training photographs, and which of TRAINING it is of."""
    weights = torch.tensor([photograph.weight for photograph in TRAINING.values()])
    chosen = int(torch.multinomial(weights, 1, generator=generator))
    levels = pyramid(list(TRAINING)[chosen])
    # Small levels have few different patches.
    sides = torch.tensor([float(level.shape[1] + level.shape[2]) for level in levels])
    image = levels[int(torch.multinomial(sides, 1, generator=generator))]
    top, left = (_integer(generator, length - side + 1) for length in image.shape[1:])
    cut = turned(image[:, top : top + side, left : left + side], _integer(generator, 8))
    light = 0.75 + 0.35 * torch.rand((), generator=generator)
    tint = 1 + 0.08 * torch.randn(3, 1, 1, generator=generator) * (torch.rand((), generator=generator) < 0.5)
    if torch.rand((), generator=generator) < 0.1:
        cut = cut.mean(0, keepdim=True).expand(3, -1, -1)
    return (cut * light * tint).clamp(0, 1), chosen


def said(generator: torch.Generator, chosen: int) -> str:
    """A caption of some of a training photograph's phrases; three in ten are empty."""
    if torch.rand((), generator=generator) < 0.3:
        return ""
    phrases = list(TRAINING.values())[chosen].caption.split(", ")
    return ", ".join(phrase for phrase in phrases if torch.rand((), generator=generator) < 0.7)


def pairs(count: int, seed: int) -> dict[str, Tensor]:
    """Patches and what became of them: "clean" and "degraded" (N, 3, SIDE, SIDE) uint8, "photograph" (N,)."""
    rows: dict[str, list[Tensor]] = {"clean": [], "degraded": [], "photograph": []}
    for index in range(count):
        generator = torch.Generator().manual_seed(seed_of(seed, "pair", index))
        clean, chosen = patch(generator, SIDE)
        shrink = (1.0, 2.0, 4.0)[_integer(generator, 3)]
        strength = 0.2 + 0.8 * float(torch.rand((), generator=generator))
        config = RealWorld(shrink=shrink, strength=strength)
        image = enlarged(degrade(clean.movedim(0, -1)[None], config, seed, first=index), SIDE, SIDE)
        rows["clean"].append((clean * 255).round().byte())
        rows["degraded"].append((image[0].movedim(-1, 0) * 255).round().byte())
        rows["photograph"].append(torch.tensor(chosen))
    return {name: torch.stack(values) for name, values in rows.items()}


def _integer(generator: torch.Generator, high: int) -> int:
    return int(torch.randint(high, (), generator=generator))
