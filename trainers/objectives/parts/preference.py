"""What the methods that learn from pairs share: levels, the error of the network's own output, the loss of a label.

A pair is a winner and a loser for one prompt. The error is of what the network predicts (eps, v or flow), averaged over
a latent: on eps networks mean |eps_theta - eps|^2 as Wallace et al. 2023 (arXiv 2311.12908) have it, elsewhere the same
in the space in which the network was trained. Below a scale of 1/100 it is held, since a flow's has no bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ....sampling.parts import WHOLE, Parts
from ....sampling.settings import Settings, changed
from ..flow_matching import Drawing, Expert, FlowMatching, FlowMatchingConfig
from .contract import LOSER, Asked, Batch, Cond, Draws, Objective, Tools, TrainableDenoiser, mean_each

SMALLEST = 1e-2


@dataclass(frozen=True)
class PairConfig(Settings):
    """How levels are drawn, and of which network, as `flow_matching` has it; steps and cfg are of the previews."""

    levels: Drawing = changed(FlowMatchingConfig, "levels", advanced=True,
        help="How noise levels are drawn, as Train LoRA on Images draws them.")
    expert: Expert = changed(FlowMatchingConfig, "expert")
    boundary: float = changed(FlowMatchingConfig, "boundary")
    steps: int = changed(FlowMatchingConfig, "steps")
    cfg: float = changed(FlowMatchingConfig, "cfg", help="Guidance of the previews.")

    def matching(self) -> FlowMatchingConfig:
        """The same settings as plain fine-tuning's."""
        same = {name: getattr(self, name) for name in ("levels", "steps", "cfg", "expert", "boundary")}
        return FlowMatchingConfig(**same)


def column(batch: Batch, name: str) -> Tensor:
    """A column of the pairs. ValueError when the batch is of single images."""
    if name not in batch.columns:
        raise ValueError("this method learns from pairs of a winner and a loser, and the data are single images")
    return batch.columns[name]


def soft_loss(u: Tensor, chance: Tensor | float) -> Tensor:
    """(B,) -p log sigmoid(u) - (1 - p) log sigmoid(-u); chance is p, that the first of the pair is the better one.

    At p = 1 it is DPO's loss; elsewhere its minimum is finite, at u = log(p / (1 - p)).
    """
    return -chance * functional.logsigmoid(u) - (1 - chance) * functional.logsigmoid(-u)


class PairObjective(Objective):
    """One adapter that learns from pairs; a method says what the loss of a pair is."""

    needs = frozenset({"comparisons"})
    of_samples = True
    of_parts = True
    needs_latents = True
    config: PairConfig

    def __init__(self, config: PairConfig, denoiser: TrainableDenoiser, tools: Tools | None = None):
        super().__init__(config, denoiser, tools)
        self._matching = FlowMatching(config.matching(), denoiser, tools)

    def prepare(self, samples: Iterable[Batch]) -> None:
        """See that the data are pairs, before anything is computed."""
        super().prepare(samples)
        for batch in samples:
            column(batch, LOSER)

    def sigma(self, draws: Draws) -> Tensor:
        """The step's levels (B,), one for both of a pair."""
        return self._matching.sigma(draws)

    def errors(
        self, pair: Sequence[Tensor], sigma: Tensor, noises: Sequence[Tensor], cond: Cond,
        parts: Parts = WHOLE,
    ) -> tuple[Tensor, Tensor]:
        """(B,) mean squared errors of the network's own output at the noisy versions of winners and losers (B, ...).

        One call for both where they fit in one; the adapter is on. noises: of each; parts: what a latent is made of.
        """
        denoiser = self.denoiser
        noisy = [denoiser.path.add_noise(x, sigma, noise) for x, noise in zip(pair, noises, strict=True)]
        found = denoiser.predict_each([Asked(x, sigma, cond) for x in noisy])

        def scale(level: Tensor) -> Tensor:
            return denoiser.parametrisation.scale(level).clamp(min=SMALLEST)

        errors = (parts.scaled(scale, sigma, x0 - latents) for x0, latents in zip(found, pair, strict=True))
        winner, loser = (parts.sum(lambda _, each: mean_each(each.square()), error) for error in errors)
        return winner, loser

    def sample(self, noise: Tensor, cond: Cond, uncond: Cond) -> Tensor:
        """As plain fine-tuning's previews: Euler with guidance where there is an empty prompt."""
        return self._matching.sample(noise, cond, uncond)


def agreement(margin: Tensor) -> Tensor:
    """Share of pairs with a margin above 0; ties count as wrong."""
    return (margin.detach() > 0).to(torch.float32).mean()
