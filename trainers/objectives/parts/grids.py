"""The levels that a student is called at, and the random levels at which a method compares it with its teacher.

Student grids: DMD2 (Yin et al. 2024, arXiv 2405.14867, section 4.4): t = 999, 749, 499, 249; 399 for one step; flow:
(K - i) / K behind the model's own shift. Random levels: t ~ U(low, high) of the papers, with the shift
t' = shift t / (1 + (shift - 1) t) of SD3 (Esser et al. 2024, arXiv 2403.03206, eq. 23) on flow models.
A place (0 .. 1) is a level by its rank among the model's levels: t / 1000 in the papers, unshifted sigma on flow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ....sampling import grids, presets
from .contract import TrainableDenoiser

# At t = 999 an error of the network's eps is magnified 14.6 times in x0, at 399 1.2 times.
ONE_STEP = 0.4


def check_grid(steps: int, timesteps: str) -> None:
    """What can be said of a grid without a model. ValueError names `steps` or `timesteps`."""
    if not 1 <= steps <= 100:
        raise ValueError(f"steps must be 1 to 100, got {steps!r}: a student is worth it at 1 to 8")
    if timesteps.strip():
        count = len(presets.parse_timesteps(timesteps, highest=1000))
        if count != steps:
            raise ValueError(
                f"timesteps {timesteps!r} lists {count}, and steps is {steps}: set steps to {count}, or leave "
                "timesteps empty"
            )


def student_sigmas(denoiser: TrainableDenoiser, steps: int, timesteps: str = "") -> Tensor:
    """The levels of a student of so many steps: fp32 (steps + 1,), descending to 0, on the CPU.

    timesteps: the network's own, "999, 749, 499, 249" (a flow's are 1000 sigma); "" takes those of ComfyUI's `simple`
    scheduler, except that one step on VE and VP starts at 2/5 of the table (t = 399).
    ValueError names `steps` or `timesteps`; timesteps that this model's schedule lacks raise it too.
    """
    check_grid(steps, timesteps)
    flow = denoiser.path.kind == "FLOW"
    if timesteps.strip():
        own = presets.custom(timesteps, highest=1000 if flow else 999)
        return presets.sigmas(own, None, denoiser.schedule, denoiser.path)
    if steps == 1 and not flow:
        table = denoiser.schedule.sigmas
        return torch.tensor([float(table[round(ONE_STEP * len(table)) - 1]), 0.0])
    return grids.simple(denoiser.schedule, steps)


def level_draws(
    denoiser: TrainableDenoiser, uniform: Tensor, low: float = 0.0, high: float = 1.0, shift: float = 1.0
) -> Tensor:
    """Levels (B,) of places drawn between low and high (0 .. 1); uniform (B,) in [0, 1).

    VE and VP: an entry of the model's table, low * N .. high * N - 1 of its N (20 .. 979 of 1000 for 0.02 .. 0.98).
    FLOW: the place itself, shifted; `shift` has no meaning elsewhere.
    """
    if denoiser.path.kind == "FLOW":
        t = low + (high - low) * uniform
        t = shift * t / (1 + (shift - 1) * t)
        return t.clamp(*denoiser.sigma_range)
    table = denoiser.schedule.sigmas.to(uniform.device)
    # Rounded first: 0.29 * 1000 is 289.99999999999994.
    last = max(0, math.ceil(round(high * len(table), 6)) - 1)
    first = min(last, math.floor(round(low * len(table), 6)))
    index = first + (uniform * (last - first + 1)).long()
    return table[index.clamp(first, last)].float()


def place_of(denoiser: TrainableDenoiser, sigma: float, shift: float = 1.0) -> float:
    """The `high` that makes `level_draws` end at level sigma, sigma included."""
    if denoiser.path.kind == "FLOW":
        return sigma / (shift - (shift - 1) * sigma)
    table = denoiser.schedule.sigmas
    below = int((table.cpu() <= sigma * (1 + 1e-6)).sum())
    return max(1, below) / len(table)
