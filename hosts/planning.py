"""What a training run will take in memory, before a weight of it is loaded: for a run, a node and the command line."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..rewards.contract import Reward
from ..trainers import dry_run, planning
from ..trainers.config import RunConfig
from ..trainers.dataset import Dataset
from ..trainers.decoder import Decoder
from ..trainers.denoiser import Denoiser
from ..trainers.dry_run import Counted
from ..trainers.export import VERSION
from ..trainers.files import write_json
from ..trainers.loop import Trainer
from ..trainers.methods import METHODS
from ..trainers.weightless import META, weightless_copy
from .training_parts import add_adapters, encode, latent_reward, precision

CARDS = (8, 12, 16, 24)
KNOWN = ".counted.json"
_MOST = 200  # counts that are remembered
_log = logging.getLogger("retort.training")


def counted(
    host: Any,
    model: Any,
    config: RunConfig,
    dataset: Dataset,
    vae: Any = None,
    rewards: Sequence[Reward] = (),
    known: Path | None = None,
) -> Counted:
    """A step of this run without its weights, as its largest picture and longest prompt make it.

    known: a file in which counts are remembered. Raises what the run itself would raise for settings that cannot be.
    """
    outline = host.outline(model, precision(config))
    sample = largest(dataset)
    key = _key(outline.network, config, sample, vae, rewards)
    remembered = _read(known)
    if key in remembered:
        return Counted(**{**remembered[key], "blocks": tuple(remembered[key]["blocks"])})

    def trainer(denoiser: Denoiser) -> Trainer:
        # Accumulated batches take no more than two: from the second on, gradients are there already.
        training = replace(config.training, accumulation=min(2, config.training.accumulation), noise_scale_target=0.0)
        objective = METHODS[config.method].objective(config.objective, denoiser)
        add_adapters(denoiser, config, objective, None)
        data = encode(denoiser, sample)
        decoder = None if vae is None else host.outlined_decoder(vae)
        for name, reward in zip(("reward", "second"), rewards, strict=False):
            setattr(objective, name, latent_reward(outlined(reward), decoder, denoiser))
        return Trainer(denoiser, objective, data, replace(config, training=training), Path())

    with host.training_session():
        found = dry_run.count(outline, trainer)
    if known is not None:
        remembered[key] = asdict(found)
        write_json(known, dict(list(remembered.items())[-_MOST:]))
    return found
