"""The levels that a student is called at.

Student grids: DMD2 (Yin et al. 2024, arXiv 2405.14867, section 4.4): t = 999, 749, 499, 249; 399 for one step; flow:
(K - i) / K behind the model's own shift.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....sampling import grids, presets
from ....sampling.students.preset import MOST_STEPS
from .contract import TrainableDenoiser


def check_grid(steps: int, timesteps: str) -> None:
    """What can be said of a grid without a model. ValueError names `steps` or `timesteps`."""
    if not 1 <= steps <= MOST_STEPS:
        raise ValueError(f"steps must be 1 to {MOST_STEPS}, got {steps!r}: a student is worth it at 1 to 8")
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
    scheduler, except that one step of other models than flows starts at 2/5 of the table (t = 399), where the noise is
    1.2 times the data; there too on a continuous schedule.
    ValueError names `steps` or `timesteps`; timesteps that this model's schedule lacks raise it too.
    """
    check_grid(steps, timesteps)
    with torch.device("cpu"):  # they are numbers wherever the network is, and where it has none
        if timesteps.strip():
            own = presets.custom(timesteps, highest=presets.highest(denoiser.path))
            return presets.sigmas(own, None, denoiser.schedule, denoiser.path)
        if steps == 1:
            return torch.tensor([denoiser.levels.one_step(), 0.0])
        return grids.simple(denoiser.schedule, steps)
