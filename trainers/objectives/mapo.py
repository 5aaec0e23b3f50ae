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

from ...sampling.settings import setting
from .parts.contract import LOSER, Batch, Loss
from .parts.preference import PairConfig, PairObjective, agreement, column, soft_loss
from .parts.registry import Method, register

NEAR, FAR = 0.1, 80.0


@dataclass(frozen=True)
class MaPOConfig(PairConfig):
    """MaPO's settings. snr: s of phi. scale: T."""

    shown = ("beta", "snr", "scale", "levels", "cfg")

    beta: float = setting(0.1, 0, 1e4, step=0.1, round=1e-3,
        help="Weight of the margin between both beside fitting the winner.",
        remedy="0.1 is the paper's, 0 only fits the winners")
    snr: float = setting(0.5, 1e-3, 100, step=0.1, advanced=True,
        help="How fast a picture's likelihood falls with its error.", remedy="0.5 is the paper's")
    scale: float = setting(1000.0, 1e-3, 1e7, step=100.0, advanced=True,
        help="How sharply the margin is judged; raise it where winners and losers differ little.",
        remedy="1000 is the paper's, more sees smaller differences")


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
    config: MaPOConfig

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """One loss of winners and losers."""
        config = self.config
        sigma = self.sigma(batch.draws)
        noise = batch.draws.normal("noise", batch.shape)
        with self.denoiser.adapter("student"):
            both = batch.images, column(batch, LOSER)
            winner, loser = self.errors(both, sigma, (noise, noise), batch.cond, batch.parts)
        margin = config.scale * (phi(winner, config.snr) - phi(loser, config.snr))
        each = winner + config.beta * soft_loss(margin, 1.0)
        metrics: dict[str, Tensor | float] = {
            "margin": margin.detach().mean(), "accuracy": agreement(margin), "winner": winner.detach().mean(),
            "loser": loser.detach().mean(),
        }  # fmt: skip
        yield Loss("student", each.mean(), metrics, each, (winner, loser), sigma)


register(Method("mapo", MaPOConfig, MaPO, "preference"))
