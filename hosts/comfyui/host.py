"""What nodes ask of ComfyUI; `hosts.api` says what each function promises."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import comfy.samplers
from comfy.model_sampling import ModelSamplingAV, ModelSamplingDiscreteFlow, ModelSamplingFlux

from ...sampling.distilled import Mode, Start
from ...sampling.path import NoisePath
from ...sampling.presets import Preset
from . import embedded as _embedded
from .coordinates import Prediction, path_of, prediction_of
from .sampler import DistilledSampler

embedded = _embedded.load
add_model_folders = _embedded.add_model_folders


def noise_path(model) -> NoisePath:
    """The coordinates that a MODEL samples in."""
    return path_of(schedule(model))


def schedule(model):
    """The model's model_sampling object, the patched one where a patch replaces it."""
    return model.get_model_object("model_sampling")


def prediction(model) -> Prediction:
    """What the MODEL's network predicts."""
    return prediction_of(schedule(model))


def latent_format(model) -> tuple[int, int]:
    """(channels, spatial and temporal dimensions) of the MODEL's latents."""
    form = model.get_model_object("latent_format")
    return form.latent_channels, form.latent_dimensions


def with_shift(model, shift: float):
    """A clone of a flow MODEL with SD3's timestep shift; ValueError for a model that has none to set."""
    old = schedule(model)
    new = copy.deepcopy(old)
    if isinstance(old, ModelSamplingAV):
        new.set_parameters(shift=shift, audio_shift=old.audio_shift, multiplier=old.multiplier)
    elif isinstance(old, ModelSamplingDiscreteFlow):
        new.set_parameters(shift=shift, multiplier=old.multiplier)
    elif isinstance(old, ModelSamplingFlux):
        # Flux writes the same curve with the exponential of its shift.
        new.set_parameters(shift=math.log(shift))
    else:
        raise ValueError(
            f"shift {shift:g} cannot be set: only flow models have a timestep shift, and this one predicts "
            f"{prediction_of(old)}; load a flow model such as SD3, Flux or Wan"
        )
    clone = model.clone()
    clone.add_object_patch("model_sampling", new)
    return clone


def distilled_sampler(mode: Mode, start: Start, preset: Preset | None = None) -> DistilledSampler:
    """SAMPLER for few-step students."""
    return DistilledSampler(mode, start, preset)


def cfg_guider(model, positive, negative, cfg: float):
    """GUIDER with classifier-free guidance; ValueError when cfg needs the negative that is not there."""
    guider = comfy.samplers.CFGGuider(model)
    if negative is None:
        if cfg != 1:
            raise ValueError(f"cfg {cfg:g} compares with a negative prompt: connect `negative`")
        guider.inner_set_conds({"positive": positive})
    else:
        guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return guider


def models_folder() -> Path:
    """Folder of the embedded weights."""
    return _embedded.FOLDER
