"""Rewards that need no network: JPEG size, sharpness, colourfulness, likeness by pixels.

JPEG size as reward: Black et al. 2023 (DDPO, arXiv 2305.13301). Sharpness: variance of the Laplacian (Pech-Pacheco et
al. 2000). Colourfulness: Hasler and Süsstrunk 2003, "Measuring colourfulness in natural images", eq. M3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .preprocess import Preprocess, to_bytes
from .scoring import checked, each

INFINITE = float("inf")
LUMA = (0.299, 0.587, 0.114)


@dataclass(eq=False)
class JpegSize:
    """Minus the size as JPEG in kB (1000 bytes): smooth pictures score high; `prefer="large"`: plus, detailed ones.

    encode: one picture (H, W, 3) uint8 and the quality -> the file's bytes; whoever runs us has a JPEG encoder.
    """

    encode: Callable[[Tensor, int], bytes]
    quality: int = 95
    prefer: str = "small"
    name: str = "JPEG size"
    differentiable: bool = False

    def __post_init__(self) -> None:
        if self.prefer not in ("small", "large"):
            raise ValueError(f"prefer {self.prefer!r} is not known; use small or large")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality {self.quality} must be between 1 and 100; 95 is the published choice")

    @property
    def range(self) -> tuple[float, float]:
        """A file has at least a header."""
        return (-INFINITE, 0.0) if self.prefer == "small" else (0.0, INFINITE)

    def __call__(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """(B,) fp32."""
        each(prompts, len(checked(images)))
        sign = -1 if self.prefer == "small" else 1
        sizes = [sign * len(self.encode(image, self.quality)) / 1000 for image in to_bytes(images)]
        return torch.tensor(sizes, dtype=torch.float32, device=images.device)


@dataclass(eq=False)
class Sharpness:
    """Variance of the Laplacian of luma in 0..255; noise counts as sharp, so combine it with something."""

    name: str = "sharpness"
    differentiable: bool = True
    range: tuple[float, float] = (0.0, INFINITE)

    def __call__(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """(B,) fp32."""
        images = checked(images)
        each(prompts, len(images))
        luma = (images * images.new_tensor(LUMA)).sum(-1)[:, None] * 255
        padded = F.pad(luma, (1, 1, 1, 1), mode="reflect" if min(luma.shape[-2:]) > 1 else "replicate")
        kernel = padded.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])[None, None]
        return F.conv2d(padded, kernel).flatten(1).var(1, correction=0)


@dataclass(eq=False)
class Colourfulness:
    """0 is grey; about 33 moderately, 59 quite, 109 extremely colourful (values in 0..255)."""

    name: str = "colourfulness"
    differentiable: bool = True
    range: tuple[float, float] = (0.0, 260.0)

    def __call__(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """(B,) fp32."""
        images = checked(images)
        each(prompts, len(images))
        red, green, blue = (images * 255).flatten(1, 2).unbind(-1)
        opponents = torch.stack((red - green, (red + green) / 2 - blue))
        # The root's slope at 0, a grey picture, would be infinite.
        spread = (opponents.var(2, correction=0).sum(0) + 1e-12).sqrt()
        centre = (opponents.mean(2).square().sum(0) + 1e-12).sqrt()
        return spread + 0.3 * centre


class PixelLikeness:
    """1 - root mean square difference to a reference, its pictures' mean; both stretched to the same square."""

    name = "pixel likeness"
    differentiable = True
    range = (0.0, 1.0)

    def __init__(self, reference: Tensor, size: int = 64):
        self._fit = Preprocess(size, "stretch", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self._reference = self._fit(reference.detach())

    def __call__(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """(B,) fp32."""
        each(prompts, len(checked(images)))
        pixels = self._fit(images)[:, None] - self._reference.to(images.device)[None]
        return 1 - (pixels.flatten(2).square().mean(2) + 1e-12).sqrt().mean(1)
