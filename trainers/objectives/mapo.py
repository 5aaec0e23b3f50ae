"""Teaches a preference from pairs without a reference: fits the winner, and a margin between both. MaPO.

Hong et al. 2024 (arXiv 2406.06424), in the form of its released weights: L = D_w - beta log sigmoid(T (phi(D_w) -
phi(D_l))), phi(D) = s D / (exp(s D) - 1) with s = 0.5 and T = 1000, D the mean squared error of the network's own
output at one level and one noise for both of a pair. Only the passes with gradients are made. The slope of phi is
autograd's of this form; the one that the paper prints holds at 0 alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .parts.contract import Batch, Loss, TrainableDenoiser
from .parts.preference import LOSER, PairConfig, PairObjective, agreement, column, require, soft_loss

NEAR, FAR = 0.1, 80.0


@dataclass(frozen=True)
class MaPOConfig(PairConfig):
    """beta: weight of the margin beside fitting the winner. snr: s of phi. scale: T, how sharply margins are judged."""

    beta: float = 0.1
    snr: float = 0.5
    scale: float = 1000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            {
                "beta": (self.beta, 0, 1e4, "0.1 is the paper's, 0 only fits the winners"),
                "snr": (self.snr, 1e-3, 100, "0.5 is the paper's"),
                "scale": (self.scale, 1e-3, 1e7, "1000 is the paper's, more sees smaller differences"),
            }
        )


def phi(error: Tensor, snr: float) -> Tensor:
    """y / (exp(y) - 1) of y = snr * error >= 0: 1 at 0, falling with slope -snr / 2."""
    y = snr * error
    # Beyond FAR it is 0 in fp32, and exp's own gradient there infinite.
    far = y.clamp(NEAR, FAR)
    # Near 0 the quotient's gradient is a difference of large numbers; its series is exact to 1e-14 up to NEAR.
    near = y.clamp(max=NEAR)
    s = near.square()
    series = 1 - near / 2 + s / 12 - s.square() / 720 + s.pow(3) / 30240
    return torch.where(y < NEAR, series, far / torch.expm1(far))


class MaPO(PairObjective):
    """Margin-aware preference of one adapter; see the module."""

    name = "mapo"

    def __init__(self, config: MaPOConfig, denoiser: TrainableDenoiser):
        super().__init__(config, denoiser)
        self.config = config

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """One loss of winners and losers."""
        config = self.config
        sigma = self.sigma(batch.draws)
        noise = batch.draws.normal("noise", batch.shape)
        with self.denoiser.adapter("student"):
            both = batch.images, column(batch, LOSER)
            winner, loser = self.errors(both, sigma, (noise, noise), batch.cond)
        margin = config.scale * (phi(winner, config.snr) - phi(loser, config.snr))
        each = winner + config.beta * soft_loss(margin, 1.0)
        metrics: dict[str, Tensor | float] = {
            "margin": margin.detach().mean(), "accuracy": agreement(margin), "winner": winner.detach().mean(),
            "loser": loser.detach().mean(),
        }  # fmt: skip
        yield Loss("student", each.mean(), metrics, each, (winner, loser), sigma)
