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
from typing import Literal, get_args

import torch
from torch import Tensor

from .dmd2 import DMD2, DMD2Config
from .parts.contract import TrainableDenoiser, broadcast

Divergence = Literal[
    "reverse_kl", "softened_reverse_kl", "jensen_shannon", "squared_hellinger", "forward_kl", "jeffreys", "neyman",
    "pearson",
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
    """DMD2's settings and: divergence; ratio_low, ratio_high: r is clipped to them; ratio_normalise: r over the mean of
    its level's bin; ratio_ema: how much of the running means a step keeps.
    """

    gan_weight: float = 5e-3
    divergence: Divergence = "jensen_shannon"
    ratio_low: float = 0.1
    ratio_high: float = 20.0
    ratio_normalise: bool = True
    ratio_ema: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gan_weight <= 0:
            raise ValueError(
                f"gan_weight is {self.gan_weight!r}, and f-distill takes its ratio from the discriminator: set it "
                "above 0 (0.005), or choose DMD2"
            )
        if self.divergence not in get_args(Divergence):
            raise ValueError(f"divergence must be one of {', '.join(get_args(Divergence))}, got {self.divergence!r}")
        if not (0 < self.ratio_low <= 1 <= self.ratio_high and self.ratio_high <= MOST_RATIO):
            raise ValueError(
                f"ratio_low and ratio_high must enclose 1 and be above 0, got {self.ratio_low!r} and "
                f"{self.ratio_high!r}: 0.1 and 20 are usual"
            )
        if not 0 <= self.ratio_ema < 1:
            raise ValueError(
                f"ratio_ema must be 0 or more and below 1, got {self.ratio_ema!r}: 0.9 suits small batches"
            )


class Averages:
    """Running means of several quantities, each over the samples that it was seen on; `initial` until the first."""

    def __init__(self, count: int, initial: float, ema: float):
        self.ema, self.initial = ema, initial
        # Sum and number of samples, both decayed: their quotient is unbiased from the first step on.
        self.state = torch.zeros(2, count)

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
    judges_matched = True
    config: FDistillConfig

    def __init__(self, config: FDistillConfig, denoiser: TrainableDenoiser):
        super().__init__(config, denoiser)
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
