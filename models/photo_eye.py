"""The eye that judges restored photographs: a small classifier, never part of any restorer's loss.

It learnt which of the training photographs a patch is cut from, and whether it has been degraded. Its features compare
pictures as LPIPS compares them with a network's of ImageNet; its second answer needs no clean picture.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (32, 64, 96, 128)


class Eye(nn.Module):
    """Pictures (B, H, W, 3) in [0, 1], 16 pixels a side or more.

    photographs: how many it was taught to tell apart.
    """

    def __init__(self, photographs: int):
        super().__init__()
        layers, before = [], 3
        for width in WIDTHS:
            layers.append(nn.Conv2d(before, width, 3, stride=1 if before == 3 else 2, padding=1))
            before = width
        self.layers = nn.ModuleList(layers)
        self.which = nn.Linear(before, photographs)
        self.clean = nn.Linear(sum(WIDTHS), 1)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Four features (B, C, h, w), for `restoration.perceptual.feature_distance`."""
        x, found = images.movedim(-1, 1) * 2 - 1, []
        for layer in self.layers:
            x = F.gelu(layer(x))
            found.append(x)
        return found

    def answers(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, photographs) of the photograph, and (B,) of being clean."""
        found = self(images)
        everywhere = torch.cat([f.std((2, 3)) for f in found], 1)
        return self.which(found[-1].mean((2, 3))), self.clean(everywhere)[:, 0]
