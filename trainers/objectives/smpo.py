"""Teaches a preference from pairs by how much better the winner is, with its own noise found by inversion: SmPO.

Lu et al. 2025 (arXiv 2506.02698): a pair's label is p = sigmoid(difference of normalised rewards), and the loss
-log sigmoid(-(2p - 1) gamma (beta/2) [s_w - s_l]), s = |tau - eps_theta(x_t)|^2 - |tau - eps_ref(x_t)|^2. x_t is not x0
with fresh noise but x0 carried up the network's own ODE, and tau is the noise that x_t then holds. p = 1/2 teaches
nothing; at p = 1, gamma = 1 and with fresh noise it is Diffusion-DPO.

The weighted form has no finite optimum for any p but 1/2. labels "soft" takes the cross-entropy with p instead, -p log
sigmoid(u) - (1 - p) log sigmoid(-u), u = -gamma (beta/2) [s_w - s_l], whose minimum is u = log(p / (1 - p)).

Inversion is DDIM's (Song et al. 2020, arXiv 2010.02502, section 4.3) in dx/dsigma = (x - x0) / sigma, which holds on VE
and FLOW, and ends at the level of the loss exactly. ReNoise (Garibi et al. 2024, arXiv 2403.14602): each step is taken
again with the mean of the noise predicted at its two ends, which makes the error second order in the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...sampling.path import broadcast, vp_scale
from ...sampling.settings import changed, setting
from .dpo import DPOConfig, watched
from .parts.contract import LOSER, STRENGTH, Asked, Batch, Cond, Loss
from .parts.preference import PairConfig, PairObjective, column, soft_loss
from .parts.registry import Method, register

Labels = Literal["weight", "soft"]


@dataclass(frozen=True)
class SmPOConfig(PairConfig):
    """SmPO's settings; for `labels` see the module. temperature: difference of the stored rewards that makes p = 0.73.
    inversion_steps: 0 takes fresh noise shared by the pair, as DPO has it.
    """

    shown = ("beta", "gamma", "labels", "temperature", "inversion_steps", "renoise", "levels", "cfg")

    beta: float = changed(DPOConfig, "beta", default=2000.0,
        help="As DPO's, times gamma: how dearly leaving the model as it was is paid.",
        remedy="2000 to 5000 are the paper's")
    gamma: float = setting(10.0, 1e-3, 1e4, advanced=True, step=0.5, help="Multiplies beta; 10 is the paper's code's.",
        remedy="10 is the released code's, 1 DPO's")
    labels: Labels = setting("weight", advanced=True,
        help="weight: as published, pairs count by their certainty. soft: learns the certainty, and then stops.",
        page="*weight*: as published, the loss of a pair is DPO's, scaled by its certainty; an even pair teaches "
        "nothing. *soft*: the cross-entropy with the certainty, which stops where it is reached.")
    temperature: float = setting(1.0, 1e-6, 1e9, advanced=True, step=0.01, round=1e-6,
        help="Strength that makes a pair 73 % certain: take the median that Preference Set shows.",
        page="The certainty of a pair is 1 / (1 + exp(-strength / temperature)). Strengths are in the judge's own "
        "units: take the median that *Preference Set* shows, or less.",
        remedy="take the usual difference of rewards in a pair")
    inversion_steps: int = setting(5, 0, 1000, advanced=True,
        help="Steps that find each picture's own noise; 0 takes fresh noise, as DPO does, and is much faster.",
        page="Steps that carry each picture up the network's own ODE to the level of the loss. 0 takes fresh noise, "
        "as DPO does, and is much faster.", remedy="5 to 10 are the paper's, 0 takes fresh noise")
    renoise: bool = setting(True, advanced=True, help="Two calls in each of those steps, far more exact.",
        page="Each of those steps again with the mean of the noise at its two ends, which makes it second order.")


class SmPO(PairObjective):
    """Smoothed preference of one adapter; see the module."""

    name = "smpo"
    config: SmPOConfig

    def losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """One loss: the inversions and both errors without gradients, both errors with."""
        config, cond, denoiser = self.config, batch.cond, self.denoiser
        both = batch.images, column(batch, LOSER)
        chance = torch.sigmoid(column(batch, STRENGTH) / config.temperature)
        sigma = self.sigma(batch.draws)
        if config.inversion_steps:
            asked = [Asked(latents, sigma, cond) for latents in both]
            whole = denoiser.joined(asked)
            found = [self.found_noise(*one) for one in (asked if whole is None else [whole])]
            noises = torch.cat(found).split(len(sigma))
        else:
            noises = (batch.draws.normal("noise", batch.shape),) * 2
        with torch.no_grad(), denoiser.adapter(None):
            winner, loser = self.errors(both, sigma, noises, cond, batch.parts)
            reference = winner - loser
        with denoiser.adapter("student"):
            winner, loser = self.errors(both, sigma, noises, cond, batch.parts)
        u = -0.5 * config.beta * config.gamma * (winner - loser - reference)
        each = soft_loss((2 * chance - 1) * u, 1.0) if config.labels == "weight" else soft_loss(u, chance)
        metrics = watched(u, winner) | {"chance": chance.mean()}
        yield Loss("student", each.mean(), metrics, each, (winner, loser), sigma)

    def found_noise(self, latents: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """tau (B, ...): the unit noise in what the student's ODE carries the latents to, at level sigma (B,)."""
        return self.denoiser.path.noise_from(self.inverted(latents, sigma, cond), latents, sigma)

    @torch.no_grad()
    def inverted(self, latents: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """x_t (B, ...) at level sigma (B,) that the student's ODE would carry down to the latents, without guidance."""
        grid = self._grid(sigma)
        x = latents
        with self.denoiser.adapter("student"):
            for low, high in zip(grid, grid[1:], strict=False):
                step = broadcast(high - low, x)
                slope = self._slope(x, low, cond)
                if self.config.renoise:
                    slope = (slope + self._slope(x + step * slope, high, cond)) / 2
                x = x + step * slope
        return self._in_path(x, sigma)

    def _grid(self, sigma: Tensor) -> list[Tensor]:
        """Levels (B,) from 0 to sigma, even in the network's timestep."""
        steps, levels = self.config.inversion_steps, self.denoiser.levels
        shares = [number / steps for number in range(1, steps)]
        if self.denoiser.path.kind == "FLOW":
            between = [sigma * share for share in shares]
        else:
            time = levels.time(sigma)
            # Not above sigma: between two timesteps the nearest one's level may be.
            between = [torch.minimum(levels.level(time * share), sigma) for share in shares]
        return [torch.zeros_like(sigma), *between, sigma]

    def _slope(self, x: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """dx/dsigma of the ODE; at level 0, which no network knows, that of its lowest level."""
        level = sigma.clamp(min=self.denoiser.sigma_range[0])
        x0 = self.denoiser.predict_x0(self._in_path(x, level), level, cond)
        return (x - x0) / broadcast(level, x)

    def _in_path(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The ODE's latent as the model's sampler carries it: on VP it is VE's over sqrt(1 + sigma^2)."""
        return x / broadcast(vp_scale(sigma), x) if self.denoiser.path.kind == "VP" else x


register(Method("smpo", SmPOConfig, SmPO, "preference"))
