"""Restores in one call: the clean latent of the degraded picture enters the network as if it were noised.

Zhu et al. 2025, InstaRevive (ICLR; github.com/EternalEvan/InstaRevive), inference: z is the encoded degraded picture,
eps = network(z, t = 400) with no noise added and nothing scaled, and the restored latent is
(z - sqrt(1 - abar_t) eps) / sqrt(abar_t), with DDPM's linear betas from 1e-4 to 0.02.

That is a model's own x0 at the level whose timestep is t, of the latent whose network input is z. Said so, it holds for
any one-step student, and the rest is our extension: with v it is a z - s v, and on a flow, at level t / 1000, it is
z - (t / 1000) v. On every path the network sees z itself and the timestep t.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..sampling import presets
from ..sampling.distilled import Rule, sample_distilled
from ..sampling.path import NoisePath
from ..sampling.schedule import Schedule
from ..sampling.settings import Settings, setting

# Slopes between which a restorer stays. A multi-step model takes what it sees for sqrt(abar) x0, or (1 - t) x0, plus
# noise, and so enlarges it: the embedded flow twin 1.2 to 1.3 times at t = 400, and what it has made 1.1 to 1.25 times
# again. A restorer enlarges what is very blurred, too, 1.2 times with the embedded one, but what it has made 1.03 to
# 1.09 times. Models that do so little are not told apart.
SLOPES = (0.75, 1.15)
MOST_AGAIN = 1.1


@dataclass(frozen=True)
class OneStep(Settings):
    """timestep: what the network was told in training."""

    timestep: int = setting(400, 1, 1000, remedy="400 is InstaRevive's",
        help="What the restorer was trained at; 400 is InstaRevive's.",
        page="What the restorer was trained at. On a flow model this is 1000 times its level.")

    def sigmas(self, schedule: Schedule, path: NoisePath) -> Tensor:
        """The grid (2,) of the one call: the level of the timestep, and 0. ValueError where the model has none."""
        preset = replace(presets.PRESETS["custom"], title="one-step restoration", timesteps=((self.timestep,),))
        return presets.sigmas(preset, None, schedule, path)


def restore(
    model: Any,
    latent: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Any = None,
    disable: bool | None = True,
    *,
    path: NoisePath,
) -> Tensor:
    """x0 (B, C, ...) of one call for clean latents of degraded pictures, in the model's own scale.

    model: the Denoiser contract. sigmas: (2,), of `OneStep.sigmas`. Raises what `sampling.standard` raises.
    """
    x = path.unit_input(sigmas[0], latent)
    return sample_distilled(model, x, sigmas, extra_args, callback, disable, path=path, rule=Rule("single"))


def slope(latent: Tensor, restored: Tensor) -> float:
    """Of the regression of restored latents (B, C, ...) on the degraded ones, each channel less its mean.

    1 where nothing changes, and where there is nothing to compare.
    """
    given, made = (x.double().flatten(2) - x.double().flatten(2).mean(2, keepdim=True) for x in (latent, restored))
    power = given.square().sum()
    return float((given * made).sum() / power) if power > 1e-6 * given.numel() else 1.0
