"""What nodes ask of the headless host; `hosts.api` says what each function promises."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from ...sampling.distilled import Mode, Start
from ...sampling.path import NoisePath
from ...sampling.presets import Preset
from ...sampling.schedule import FlowSchedule, FluxSchedule, Schedule
from . import embedded as _embedded
from .folders import EMBEDDED
from .guider import Guider
from .model import Conditioning, Model, Prediction
from .samplers import DistilledSampler

embedded = _embedded.load


def noise_path(model: Model) -> NoisePath:
    """The coordinates that a MODEL samples in."""
    return model.path


def schedule(model: Model) -> Schedule:
    """The model's schedule, which has the members of ComfyUI's model_sampling object."""
    return model.schedule


def prediction(model: Model) -> Prediction:
    """What the MODEL's network predicts."""
    return model.prediction


def latent_format(model: Model) -> tuple[int, int]:
    """(channels, spatial and temporal dimensions) of the MODEL's latents."""
    return model.latent.channels, model.latent.dims


def with_shift(model: Model, shift: float) -> Model:
    """A flow MODEL with SD3's timestep shift; ValueError for a model that has none to set."""
    old = model.schedule
    if isinstance(old, FlowSchedule):
        return replace(model, schedule=replace(old, shift=shift))
    if isinstance(old, FluxSchedule):
        # Flux writes the same curve with the exponential of its shift.
        return replace(model, schedule=FluxSchedule(math.log(shift)))
    raise ValueError(
        f"shift {shift:g} cannot be set: only flow models have a timestep shift, and this one predicts "
        f"{model.prediction}; load a flow model such as SD3 or Flux"
    )


def distilled_sampler(mode: Mode, start: Start, preset: Preset | None = None) -> DistilledSampler:
    """SAMPLER for few-step students."""
    return DistilledSampler(mode, start, preset)


def cfg_guider(model: Model, positive: Conditioning, negative: Conditioning | None, cfg: float) -> Guider:
    """GUIDER with classifier-free guidance; ValueError when cfg needs the negative that is not there."""
    if negative is None and cfg != 1:
        raise ValueError(f"cfg {cfg:g} compares with a negative prompt: connect `negative`")
    return Guider(model, positive, negative, cfg)


def models_folder() -> Path:
    """Folder of the embedded weights."""
    return EMBEDDED


def add_model_folders() -> None:
    """The headless loaders know the folder already."""
