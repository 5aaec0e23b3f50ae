"""Resizes any part of a picture exactly as the whole would be resized, so that no whole enlargement need exist.

"cubic": Keys 1981, "Cubic convolution interpolation for digital image processing", with a = -1/2, as Pillow's BICUBIC;
"linear": the triangle. Where a side shrinks, the kernel widens with it, against aliasing. Weights outside the picture
are left out and the others made to add up to one, as Pillow does.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["cubic", "linear"]
_REACH = {"cubic": 2.0, "linear": 1.0}


def enlarged(height: int, width: int, scale: float, least: int = 0) -> tuple[int, int]:
    """(height, width) at a scale, rounded up; where the shorter is below `least`, both grow until it is not."""
    # 1.1 * 10 is a little above 11.
    sides = tuple(max(1, math.ceil(round(side * scale, 6))) for side in (height, width))
    shortest = min(sides)
    if shortest < least:
        sides = tuple(math.ceil(side * least / shortest) for side in sides)
    return sides[0], sides[1]


def region(
    images: Tensor, size: tuple[int, int], box: tuple[int, int, int, int] | None = None, kernel: Kernel = "cubic"
) -> Tensor:
    """The box (top, bottom, left, right) of images (B, H, W, C) resized to `size` (height, width); None: all of them.

    fp32 (B, bottom - top, right - left, C), not cut to [0, 1]: cubic weights overshoot.
    """
    height, width = images.shape[1:3]
    top, bottom, left, right = box or (0, size[0], 0, size[1])
    if (height, width) == size:
        return images[:, top:bottom, left:right].float()
    (y0, y1), down = _matrix(height, size[0], top, bottom, kernel)
    (x0, x1), across = _matrix(width, size[1], left, right, kernel)
    part = images[:, y0:y1, x0:x1].float()
    part = torch.einsum("yh,bhwc->bywc", down.to(part), part)
    return torch.einsum("xw,bywc->byxc", across.to(part), part)


def source_box(source: tuple[int, int], size: tuple[int, int], box: tuple[int, int, int, int]):
    """The pixels (top, bottom, left, right) of a source (height, width) that a box of its resized picture shows."""
    (top, bottom), (left, right) = (
        (math.floor(begin * was / now), math.ceil(end * was / now))
        for was, now, begin, end in zip(source, size, box[::2], box[1::2], strict=True)
    )
    return top, max(bottom, top + 1), left, max(right, left + 1)


def _matrix(was: int, now: int, begin: int, end: int, kernel: Kernel) -> tuple[tuple[int, int], Tensor]:
    """The source pixels (first, last + 1) that outputs begin .. end need, and the weights (end - begin, pixels)."""
    step = was / now
    wide = max(step, 1.0)
    centre = (torch.arange(begin, end, dtype=torch.float64) + 0.5) * step
    reach = _REACH[kernel] * wide
    first = max(0, math.floor(float(centre[0]) - reach))
    last = min(was, math.ceil(float(centre[-1]) + reach))
    place = torch.arange(first, last, dtype=torch.float64) + 0.5
    d = ((place[None] - centre[:, None]) / wide).abs()
    if kernel == "linear":
        weight = (1 - d).clamp_min(0)
    else:
        near = (1.5 * d - 2.5) * d * d + 1
        far = ((-0.5 * d + 2.5) * d - 4) * d + 2
        weight = torch.where(d < 1, near, torch.where(d < 2, far, torch.zeros_like(d)))
    return (first, last), weight / weight.sum(1, keepdim=True)
