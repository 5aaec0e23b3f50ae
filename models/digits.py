"""Handwritten digits in colour, with captions that are true because their words are measured on the image.

The 1,797 digits of scikit-learn (UCI "Optical Recognition of Handwritten Digits", CC BY 4.0) are drawn at 64 x 64 with
a random affine map, pen threshold, ink and paper. Stroke weight and slant are then measured on the finished stroke, so
a caption never claims what the picture does not show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

SIZE = 64
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("black", "white", "red", "orange", "yellow", "green", "blue", "purple")
WEIGHTS = ("thin", "regular", "bold")
SLANTS = ("left", "upright", "right")

# Lowest and highest hue, saturation and value of each colour name.
_HSV = {
    "black": ((0, 0, 0), (1, 0.3, 0.12)),
    "white": ((0, 0, 0.92), (1, 0.05, 1)),
    "red": ((-0.015, 0.8, 0.75), (0.015, 1, 0.95)),
    "orange": ((0.07, 0.85, 0.92), (0.095, 1, 1)),
    "yellow": ((0.145, 0.75, 0.92), (0.165, 1, 1)),
    "green": ((0.31, 0.65, 0.45), (0.38, 0.95, 0.7)),
    "blue": ((0.58, 0.7, 0.65), (0.63, 1, 0.95)),
    "purple": ((0.76, 0.55, 0.45), (0.81, 0.85, 0.7)),
}
# Pairs too close in lightness or hue for a reader to tell ink from paper.
_CLASHES = (
    {"black", "blue"},
    {"black", "purple"},
    {"white", "yellow"},
    {"red", "orange"},
    {"orange", "yellow"},
    {"blue", "purple"},
)
PAIRS = [
    (ink, paper)
    for ink, a in enumerate(COLOURS)
    for paper, b in enumerate(COLOURS)
    if a != b and {a, b} not in _CLASHES
]
_THIN, _BOLD = 7.8, 9.5  # mean stroke width in pixels
_LEAN = 0.12  # shear: horizontal shift per unit of height


@dataclass(frozen=True)
class Digits:
    """Drawn digits: image (B, 3, 64, 64) in [0, 1] and integer attributes (B,) that index the word lists above."""

    image: torch.Tensor
    digit: torch.Tensor
    ink: torch.Tensor
    paper: torch.Tensor
    weight: torch.Tensor
    slant: torch.Tensor

    def caption(self, i: int, generator: torch.Generator | None = None) -> str:
        """The full caption of item i; with a generator, a varied one that may leave attributes out."""
        values = (self.digit, self.ink, self.paper, self.weight, self.slant)
        return described([int(value[i]) for value in values], generator)[0]


def load(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Grey fields (N, 1, 8, 8) in [0, 1] and labels (N,) of "train" (1,437) or "held_out" (360, never trained on)."""
    from sklearn.datasets import load_digits

    if split not in ("train", "held_out"):
        raise ValueError(f'split is "{split}"; use "train" or "held_out"')
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(1797))
    chosen = order[:360] if split == "held_out" else order[360:]
    fields = torch.from_numpy(data.images).float()[:, None] / 16
    return fields[chosen], torch.from_numpy(data.target).long()[chosen]


def draw(fields: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> Digits:
    """Draw grey fields (B, 1, 8, 8) as coloured digits, one random hand, pen, ink and paper each."""
    n = len(labels)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    stroke = _stroke(fields, uniform)
    pair = torch.tensor(PAIRS)[torch.randint(len(PAIRS), (n,), generator=generator)]
    ink, paper = pair[:, 0], pair[:, 1]
    ink_rgb, paper_rgb = (_rgb(c, torch.rand(n, 3, generator=generator)) for c in (ink, paper))
    # Paper is lit from one side by a few per cent: enough that it is a picture, too little to change its colour name.
    angle, depth = uniform(0, 2 * math.pi), uniform(0, 0.05)
    axis = torch.linspace(-1, 1, SIZE)
    ramp = axis[None, None, :] * angle.cos()[:, None, None] + axis[None, :, None] * angle.sin()[:, None, None]
    light = 1 - depth[:, None, None, None] * (0.5 + 0.5 * ramp[:, None])
    image = (paper_rgb[:, :, None, None] * light * (1 - stroke) + ink_rgb[:, :, None, None] * stroke).clamp(0, 1)
    weight, slant = measure(stroke)
    return Digits(image, labels, ink, paper, weight, slant)


def _stroke(fields: torch.Tensor, uniform) -> torch.Tensor:
    """Ink coverage (B, 1, 64, 64): the field resampled through an affine map and cut at a pen threshold."""
    n = len(fields)
    rotation, shear = uniform(-0.12, 0.12), uniform(-0.32, 0.32)
    height, width = uniform(0.62, 0.82), uniform(0.62, 0.86)
    shift_x, shift_y = uniform(-0.1, 0.1), uniform(-0.1, 0.1)
    cos, sin, zero = rotation.cos(), rotation.sin(), torch.zeros(n)
    # grid_sample maps output to input, so the map is the inverse of what is done to the digit.
    turn = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)
    skew = torch.stack([torch.stack([1 / width, shear / width], -1), torch.stack([zero, 1 / height], -1)], -2)
    linear = skew @ turn
    offset = -(linear @ torch.stack([shift_x, shift_y], -1)[..., None])
    grid = F.affine_grid(torch.cat([linear, offset], -1), [n, 1, SIZE, SIZE], align_corners=False)
    padded = F.interpolate(F.pad(fields, (2, 2, 2, 2)), scale_factor=4, mode="bicubic", align_corners=False)
    padded = F.avg_pool2d(F.pad(padded, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    field = F.grid_sample(padded, grid * (8 / 12), mode="bilinear", align_corners=False)
    threshold = uniform(0.34, 0.60)[:, None, None, None]
    return torch.sigmoid((field - threshold) * 22)


def measure(stroke: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and slant classes (B,), (B,) of ink coverage (B, 1, H, W).

    Stroke width is 2 area / perimeter; slant is minus the slope of x on y, so that leaning right is positive.
    """
    ink = stroke[:, 0]
    area = ink.sum((1, 2))
    dy, dx = torch.gradient(ink, dim=(1, 2))
    perimeter = (dx.square() + dy.square() + 1e-12).sqrt().sum((1, 2))
    width = 2 * area / perimeter.clamp_min(1e-6)
    weight = (width > _THIN).long() + (width > _BOLD).long()
    y, x = torch.meshgrid(torch.arange(ink.shape[1]).float(), torch.arange(ink.shape[2]).float(), indexing="ij")
    mean_x = (ink * x).sum((1, 2)) / area
    mean_y = (ink * y).sum((1, 2)) / area
    off_y = y - mean_y[:, None, None]
    slope = (ink * (x - mean_x[:, None, None]) * off_y).sum((1, 2)) / (ink * off_y.square()).sum((1, 2))
    slant = 1 - (slope > _LEAN).long() + (slope < -_LEAN).long()
    return weight, slant


def _rgb(colour: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """RGB (B, 3) of colour names (B,) at a position (B, 3) inside their hue, saturation and value ranges."""
    low, high = torch.tensor([_HSV[name] for name in COLOURS], dtype=torch.float32)[colour].unbind(1)
    h, s, v = (low + (high - low) * position).unbind(-1)
    k = (torch.tensor([5.0, 3.0, 1.0]) + (h % 1.0)[:, None] * 6) % 6
    return v[:, None] * (1 - s[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


def describe(
    digit: int, ink: int, paper: int, weight: int, slant: int, generator: torch.Generator | None = None
) -> tuple[str, set[str]]:
    """A caption and the attributes it mentions: all without a generator, a random choice and phrasing with one."""

    def chance(p: float) -> bool:
        return generator is not None and float(torch.rand((), generator=generator)) < p

    said = {
        name
        for name, omitted in (("digit", 0.04), ("ink", 0.08), ("paper", 0.08), ("weight", 0.5), ("slant", 0.5))
        if not chance(omitted)
    }
    words = ["handwritten"] if chance(0.1) else []
    words += [WEIGHTS[weight]] if "weight" in said else []
    words += [COLOURS[ink]] if "ink" in said else []
    words += ["digit"] if "digit" not in said else [str(digit)] if chance(0.15) else [NUMBERS[digit]]
    text = " ".join(words)
    if not chance(0.15):
        text = f"{'an' if text[0] in 'aeiou' else 'a'} {text}"
    if "paper" in said:
        text += f"{', ' if chance(0.1) else ' on '}{COLOURS[paper]} paper"
    if "slant" in said:
        text += ", upright" if SLANTS[slant] == "upright" else f", leaning {SLANTS[slant]}"
    return text, said


def described(row: Sequence[int], generator: torch.Generator | None = None) -> tuple[str, set[str]]:
    """`describe` of a row: digit, ink, paper, weight and slant."""
    digit, ink, paper, weight, slant = row
    return describe(digit, ink, paper, weight, slant, generator)
