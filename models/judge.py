"""The embedded judge: a small CNN that reads digit, colours, stroke and slant; its features give a Fréchet distance."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from . import digits

HEADS = {
    "digit": len(digits.NUMBERS),
    "ink": len(digits.COLOURS),
    "paper": len(digits.COLOURS),
    "weight": len(digits.WEIGHTS),
    "slant": len(digits.SLANTS),
}
FEATURES = 64


class Judge(nn.Module):
    """Images (B, 3, 64, 64) in [0, 1] -> features (B, 64) and logits per attribute."""

    def __init__(self):
        super().__init__()
        widths = (3, 16, 32, 64, 96)
        self.body = nn.Sequential(
            *(
                layer
                for a, b in zip(widths, widths[1:], strict=False)
                for layer in (nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU())
            ),
            nn.Conv2d(96, 96, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(96 * 16, FEATURES),
            nn.SiLU(),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, n) for name, n in HEADS.items()})

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, 64, 64) in [0, 1] -> (B, 64)."""
        return self.body(images * 2 - 1)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, 64, 64) in [0, 1] -> logits (B, classes) per attribute name."""
        features = self.features(images)
        return {name: head(features) for name, head in self.heads.items()}


class Layers(nn.Module):
    """What the judge sees at 1/2, 1/4, 1/8 and 1/16 of the resolution; any size from 16 on."""

    def __init__(self, judge: Judge):
        super().__init__()
        self.body = nn.Sequential(*list(judge.body)[:12])

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, H, W, 3) in [0, 1] -> four features (B, C, h, w)."""
        x = images.movedim(-1, 1) * 2 - 1
        seen: list[torch.Tensor] = []
        for number, layer in enumerate(self.body):
            x = layer(x)
            if number % 3 == 2:
                seen.append(x)
        return seen


def loss(judge: Judge, batch: digits.Digits) -> torch.Tensor:
    """Sum of the heads' cross-entropies; the noisy edges of "thin" and "leaning" count half."""
    logits = judge(batch.image)
    scale = {"weight": 0.5, "slant": 0.5}
    terms = [F.cross_entropy(logits[n], getattr(batch, n)) * scale.get(n, 1.0) for n in HEADS]
    return torch.stack(terms).sum()


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Fréchet distance of two feature sets (N, F) and (M, F) (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)) with A, B the covariances.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # The eigenvalues of A B are those of A^(1/2) B A^(1/2), which is symmetric, so no complex root appears.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)
