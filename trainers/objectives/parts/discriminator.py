"""A discriminator on a denoiser's own features, whose logit becomes log p / q: small heads, averaged.

DMD2 (Yin et al. 2024, arXiv 2405.14867, section 4.3) and f-distill (Xu et al. 2025, arXiv 2502.15681, section 3.3).
Proposal, not the papers': heads pool over positions instead of striding over a map, so that they fit UNets and DiTs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

HIDDEN = 256


class Head(nn.Module):
    """One feature (B, N, C) or (B, C, ...) to a logit (B,)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.each = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        last = nn.Linear(hidden, 1)
        self.whole = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), last)
        # Undecided at first: ratio 1 everywhere, and no push on the student before anything was learnt.
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, feature: Tensor) -> Tensor:
        """(B,) logits."""
        tokens = feature if feature.ndim == 3 else feature.flatten(2).transpose(1, 2)
        return self.whole(self.each(self.norm(tokens)).mean(1))[:, 0]


class Discriminator(nn.Module):
    """A head per feature; widths: their channels. The same seed gives the same weights."""

    def __init__(self, widths: Sequence[int], seed: int, hidden: int = HIDDEN):
        super().__init__()
        if not widths:
            raise ValueError("widths is empty: a discriminator needs a denoiser with features")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # and no accelerator's, which others draw from
            self.heads = nn.ModuleList(Head(width, min(hidden, 4 * width)) for width in widths)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Logits (B,), positive where it believes in an image; ValueError when there is not one feature per head."""
        if len(features) != len(self.heads):
            raise ValueError(f"{len(features)} features came for {len(self.heads)} heads: prepare with this network")
        return torch.stack([head(f) for head, f in zip(self.heads, features, strict=True)]).mean(0)
