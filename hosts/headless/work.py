"""Latents, progress and texts without ComfyUI."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ...files.errors import UsageError
from . import progress
from .model import Model

_log = logging.getLogger("retort")


def latents_in(model: Model, samples: Tensor) -> Tensor:
    """LATENT samples in the model's own scale, fp32 on the CPU; UsageError for those of another model."""
    form = model.latent
    if samples.shape[1] != form.channels:
        raise UsageError(
            f"the latents have {samples.shape[1]} channels and the model takes {form.channels}: encode the images "
            "with the VAE that belongs to the model"
        )
    with torch.inference_mode(False):
        return form.process_in(samples.detach().clone().float().cpu())


class Progress:
    """What the run's watcher sees; see `hosts.contract`."""

    def __init__(self, total: int):
        self.total = total

    def step(self, done: int, preview: Any = None, text: str = "") -> None:
        """`done` of `total` steps are finished; pictures and texts stand in the run's own folder."""
        progress.step(done, self.total)


def say(text: str, warn: bool = False) -> None:
    """See `hosts.contract`."""
    heard = progress.say(text)
    # Python prints warnings by itself, so that a user who has heard it would read it twice.
    _log.log(logging.WARNING if warn and not heard else logging.INFO, text)
