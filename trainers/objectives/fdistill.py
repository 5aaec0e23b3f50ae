"""f-distill: distribution matching in any f-divergence, by weighting DMD2's gradient with h(r) of the density ratio.

Xu et al. 2025 (arXiv 2502.15681), theorem 1: grad D_f(p || q) = E_q[h(r) (score_q - score_p) dx_t], h = f''(r) r^2,
r = p / q = exp(logit of the discriminator); table 1 (h per divergence).
As in the authors' released code (FastGen), r is divided by running means of its level's bin. Proposals here: h is
divided by a running mean of its own, and all of these means are frozen during a step and take it in afterwards. The
paper's batch means make every weight 1 at batch size 1, and depend on how a batch is split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...sampling.path import broadcast
from ...sampling.settings import changed, setting
from .dmd2 import DMD2, DMD2Config
from .parts.contract import Tools, TrainableDenoiser
from .parts.registry import Method, register

Divergence = Literal[
    "jensen_shannon", "forward_kl", "squared_hellinger", "jeffreys", "softened_reverse_kl", "neyman", "pearson",
    "reverse_kl",
]  # fmt: skip

# h(r) = f''(r) r^2 in full, so that each is the gradient of its divergence; a constant factor is normalised away.
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "jensen_shannon": lambda r: r / (1 + r),
    "squared_hellinger": lambda r: r.sqrt() / 4,
    "forward_kl": lambda r: r,
    "jeffreys": lambda r: 1 + r,
    "neyman": lambda r: 2 / r,
    "pearson": lambda r: 2 * r.square(),
}
LOGIT_LIMIT = 10.0
BINS = 10
TINY = 1e-6
MOST_RATIO = 1e6


@dataclass(frozen=True)
class FDistillConfig(DMD2Config):
    """DMD2's settings, the divergence, and how density ratios r are made of the discriminator's answers."""

    shown = ("divergence", *DMD2Config.shown, "ratio_ema", "ratio_low", "ratio_high", "ratio_normalise")

    gan_weight: float = changed(DMD2Config, "gan_weight", default=5e-3, low=1e-12, round=1e-12,
        help="Weight of the discriminator, which needs images and gives the density ratio. Published runs: 0.005.",
        remedy="f-distill takes its ratio from the discriminator; 0.005 is the paper's, and DMD2 goes without")
    divergence: Divergence = setting("jensen_shannon",
        help="forward_kl covers the most, reverse_kl (DMD2) the least; jensen_shannon is the paper's best on text.")
    ratio_low: float = setting(0.1, 1e-6, 1, step=0.01, advanced=True, help="Smallest density ratio.",
        page="Smallest density ratio; smaller ones are cut to it.", remedy="0.1 is usual")
    ratio_high: float = setting(20.0, 1, MOST_RATIO, step=1.0, advanced=True, help="Largest density ratio.",
        page="Largest density ratio; larger ones are cut to it.", remedy="20 is usual")
    ratio_normalise: bool = setting(True, advanced=True, help="Divide ratios by the mean of their noise level.")
    ratio_ema: float = setting(0.9, 0, 0.999, step=0.01, advanced=True,
        help="Memory of the means that density ratios are divided by; small batches need a long one.",
        remedy="0.9 suits small batches")


class Averages:
    """Running means of several quantities, each over the samples that it was seen on; `initial` until the first."""

    def __init__(self, count: int, initial: float, ema: float):
        self.ema, self.initial = ema, initial
        # Sum and number of samples, both decayed: their quotient is unbiased from the first step on. They are numbers
        # to calculate with wherever the network is, and where it has no numbers.
        self.state = torch.zeros(2, count, device="cpu")

    def update(self, sums: Tensor, counts: Tensor) -> None:
        """Take in one step's; where nothing was seen nothing changes."""
        new = torch.stack([sums, counts])
        self.state.copy_(torch.where(counts > 0, self.ema * self.state + (1 - self.ema) * new, self.state))

    def means(self) -> Tensor:
        """(count,)."""
        total, seen = self.state
        return torch.where(seen > 0, total / seen.clamp(min=torch.finfo(seen.dtype).tiny), self.initial)


class FDistill(DMD2):
    """See the module; DMD2 with another weight for each sample."""

    name = "f-distill"
    without_images = "choose dmd2 with gan_weight 0, tdm or di_star, which need none"
    judges_matched = needs_latents = True
    config: FDistillConfig

    def __init__(self, config: FDistillConfig, denoiser: TrainableDenoiser, tools: Tools | None = None):
        super().__init__(config, denoiser, tools)
        self.h = WEIGHTS[config.divergence]
        self.bins = Averages(BINS, 1.0, config.ratio_ema)
        self.mean = Averages(1, float(self.h(torch.ones(()))), config.ratio_ema)

    def weighted(self, g: Tensor, logits: Tensor, uniform: Tensor) -> tuple[Tensor, dict[str, Tensor | float]]:
        """g times h(r) over its running mean; r, h and their means are what the next step's means are made of."""
        config = self.config
        place = (uniform * BINS).long().clamp(0, BINS - 1)
        free = logits.float().clamp(-LOGIT_LIMIT, LOGIT_LIMIT).exp()
        ratio = clipped = free.clamp(config.ratio_low, config.ratio_high)
        if config.ratio_normalise:
            ratio = clipped / (self.bins.means().to(clipped.device)[place] + TINY)
        h = self.h(ratio)
        weight = h / (self.mean.means().to(h.device) + TINY)
        metrics: dict[str, Tensor | float] = {
            "h": h.mean(),
            "weight_min": weight.min(),
            "weight_mean": weight.mean(),
            "weight_max": weight.max(),
            "ratio_clipped": ((free != clipped) | (logits.abs() > LOGIT_LIMIT)).float().mean(),
        }
        for i in range(BINS):
            here = (place == i).float()
            metrics |= {f"ratio_{i}": (clipped * here).mean(), f"share_{i}": here.mean()}
        return g * broadcast(weight, g), metrics

    def after_step(self, metrics: Mapping[str, float], step: int) -> None:
        """The running means take in the whole batch's."""
        if "h" not in metrics:
            return
        every = range(BINS)
        self.bins.update(
            torch.tensor([metrics[f"ratio_{i}"] for i in every]), torch.tensor([metrics[f"share_{i}"] for i in every])
        )
        self.mean.update(torch.tensor([metrics["h"]]), torch.ones(1))

    def buffers(self) -> dict[str, Tensor]:
        """Sums and counts of the running means."""
        return {"ratio_bins": self.bins.state, "h_mean": self.mean.state}


register(Method("f_distill", FDistillConfig, FDistill, "distillation"))
