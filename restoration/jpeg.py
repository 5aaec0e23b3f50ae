"""What JPEG does to a picture, in torch: ITU-T T.81 with the quality scale of the Independent JPEG Group.

Colours by BT.601 full range (JFIF), chroma halved in both directions (4:2:0), 8 x 8 DCT, quantisation by annex K's
example tables, and back with the triangle filter for chroma. Entropy coding loses nothing and is left out.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Annex K, tables K.1 (luma) and K.2 (chroma).
_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
_CHROMA = (
    (17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99),
)  # fmt: skip
_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


def tables(quality: int) -> tuple[Tensor, Tensor]:
    """Quantisation tables (8, 8) of luma and chroma at a quality of 1 .. 100. ValueError outside it."""
    if not 1 <= quality <= 100:
        raise ValueError(f"JPEG quality must be between 1 and 100, got {quality}; 75 is a usual choice")
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    chroma = torch.full((8, 8), 99)
    chroma[:4, :4] = torch.tensor(_CHROMA)
    luma, chroma = (((table * percent + 50) // 100).clamp(1, 255).float() for table in (torch.tensor(_LUMA), chroma))
    return luma, chroma


def jpeg(image: Tensor, quality: int) -> Tensor:
    """A picture (H, W, 3) in [0, 1] after one saving as JPEG and loading, in whole 255ths; any H, W from 1 on."""
    height, width = image.shape[:2]
    levels = (image.clamp(0, 1) * 255).round()
    planes = (levels @ levels.new_tensor(_YCBCR).T).movedim(-1, 0)[None]
    # Whole macroblocks of 16: the last row and column are repeated, as encoders do.
    planes = F.pad(planes, (0, -width % 16, 0, -height % 16), mode="replicate").round()
    luma, chroma = (table.to(levels) for table in tables(quality))
    bright = _coded(planes[:, :1] - 128, luma) + 128
    # Chroma is centred at zero already, so JFIF's offset of 128 is left out. Means of four end in quarters, and the
    # reference encoder rounds their halves down and up by turns, or the picture would drift.
    means = F.avg_pool2d(planes[:, 1:], 2) * 4
    bias = torch.arange(means.shape[-1], device=means.device) % 2 + 1
    colour = _coded(((means + bias) / 4).floor(), chroma)[..., : -(-height // 2), : -(-width // 2)]
    colour = F.interpolate(colour, scale_factor=2, mode="bilinear").round()[..., :height, :width]
    back = torch.cat([bright[..., :height, :width], colour], 1)[0].movedim(0, -1)
    return ((back @ back.new_tensor(_RGB).T).round() / 255).clamp(0, 1)


def _coded(planes: Tensor, table: Tensor) -> Tensor:
    """(1, C, H, W) of whole blocks, centred at zero, quantised in the DCT of 8 x 8, in whole levels again."""
    k = torch.arange(8, dtype=planes.dtype, device=planes.device)
    basis = torch.cos((2 * k[None] + 1) * k[:, None] * math.pi / 16) / 2
    basis[0] /= math.sqrt(2)
    blocks = planes.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-2, -3)
    coded = ((basis @ blocks @ basis.T) / table).round() * table
    return (basis.T @ coded @ basis).transpose(-2, -3).flatten(-4, -3).flatten(-2).round().clamp(-128, 127)
