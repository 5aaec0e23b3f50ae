"""Teaches a preference from pairs against the model as it was: Diffusion-DPO, without a second network.

Wallace et al. 2023 (arXiv 2311.12908), eq. 14: -log sigmoid(-(beta/2) [(D_w - D_l) - (D_w^ref - D_l^ref)]), D the mean
squared error of the network's own output, with one level and one noise for both of a pair. The reference is the base
with the adapter off. Where the mean of Gaussian data is shifted by d, the argument of the sigmoid is beta h^2 d
(x_w - x_l), h the response of the error to x0: labels by Bradley-Terry of k x are learnt as d = k / (beta h^2).

flipped: the share of labels believed to be wrong; the loss is then the cross-entropy with smoothed labels (Mitchell
2023, "A note on DPO with noisy preferences & relationship to IPO").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...sampling.settings import setting
from .parts.contract import LOSER, Batch, Loss
from .parts.preference import PairConfig, PairObjective, agreement, column, soft_loss
from .parts.registry import Method, register


@dataclass(frozen=True)
class DPOConfig(PairConfig):
    """beta: errors are means over a latent, so 5000 makes 2.5 of a difference of 1e-3."""

    shown = ("beta", "flipped", "levels", "cfg")

    beta: float = setting(5000.0, 1e-3, 1e7, step=0.1, round=1e-3,
        help="How dearly leaving the model as it was is paid; lower moves further, 5000 is the paper's.",
        remedy="5000 is the paper's, 500 moves further from the base")
    flipped: float = setting(0.0, 0, 0.49, advanced=True, step=0.01,
        help="Share of labels believed to be wrong; 0.1 for one in ten.",
        page="Share of labels believed to be wrong, 0.1 for one in ten; above 0 the loss has a finite minimum.",
        remedy="0.1 is for one wrong label in ten")


class DPO(PairObjective):
    """Diffusion-DPO of one adapter; see the module."""

    name = "dpo"
    config: DPOConfig

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """One loss: winners and losers without gradients, and again with."""
        both = batch.images, column(batch, LOSER)
        sigma = self.sigma(batch.draws)
        noise = batch.draws.normal("noise", batch.shape)
        with torch.no_grad(), self.denoiser.adapter(None):
            winner, loser = self.errors(both, sigma, (noise, noise), batch.cond, batch.parts)
            reference = winner - loser
        with self.denoiser.adapter("student"):
            winner, loser = self.errors(both, sigma, (noise, noise), batch.cond, batch.parts)
        u = -0.5 * self.config.beta * (winner - loser - reference)
        each = soft_loss(u, 1 - self.config.flipped)
        yield Loss("student", each.mean(), watched(u, winner), each, (winner, loser), sigma)


def watched(u: Tensor, winner: Tensor) -> dict[str, Tensor | float]:
    """How far and how often the winner is preferred more than by the base, and its own error, which must not grow."""
    return {"margin": u.detach().mean(), "accuracy": agreement(u), "winner": winner.detach().mean()}


register(Method("dpo", DPOConfig, DPO, "preference"))
