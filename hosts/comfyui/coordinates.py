"""Which coordinates a ComfyUI model lives in, and what its network predicts, read from its `model_sampling` object."""

from __future__ import annotations

import copy
import math

from comfy.model_sampling import (
    CONST,
    COSMOS_RFLOW,
    EDM,
    EPS,
    V_PREDICTION,
    V_PREDICTION_DDPM,
    X0,
    ModelSamplingAV,
    ModelSamplingDiscreteFlow,
    ModelSamplingFlux,
)

from ...sampling.levels import Prediction
from ...sampling.path import RECTIFIED, VP, NoisePath

# ComfyUI mixes a schedule and a parametrisation into a class made on the fly, so its name says nothing. These three
# methods fix the coordinates; what overrides only calculate_denoised (V_PREDICTION, EDM, X0, LCM) keeps them.
_COORDINATES = ("calculate_input", "noise_scaling", "inverse_noise_scaling")


def path_of(model_sampling) -> NoisePath:
    """The NoisePath of a `model_sampling` object; ValueError names the class when Retort has none for it."""
    owners = {_owner(type(model_sampling), method) for method in _COORDINATES}
    if owners == {EPS}:
        return NoisePath("VE", sigma_data=float(model_sampling.sigma_data))
    if owners == {V_PREDICTION_DDPM}:
        return VP
    if owners == {COSMOS_RFLOW}:
        return RECTIFIED
    if owners == {CONST}:
        # Only some flow schedules have a noise scale; core too takes 1 for the others.
        return NoisePath("FLOW", float(model_sampling.noise_scale) if hasattr(model_sampling, "noise_scale") else 1.0)
    known = {EPS, CONST, COSMOS_RFLOW, V_PREDICTION_DDPM}
    foreign = sorted(owner.__name__ for owner in owners - known) or ["a mixture"]
    raise ValueError(
        f"this model samples in coordinates of its own (model_sampling: {', '.join(foreign)}). Retort knows those of "
        "eps, v, x0 and EDM models, of flow models (SD3, Flux, Wan, Cosmos Predict2) and of CogVideoX: use one of them "
        "here"
    )


def prediction_of(model_sampling) -> Prediction:
    """What the network predicts; only asked of models whose coordinates `path_of` knows."""
    kinds: tuple[tuple[type, Prediction], ...] = (
        (CONST, "flow"), (COSMOS_RFLOW, "flow"), (X0, "x0"), (EDM, "edm"), (V_PREDICTION, "v"),
        (V_PREDICTION_DDPM, "v"), (EPS, "eps"),
    )  # fmt: skip
    for kind, prediction in kinds:
        if isinstance(model_sampling, kind):
            return prediction
    raise ValueError(f"{type(model_sampling).__mro__[1].__name__} is not a parametrisation that Retort knows")


def with_shift(model, shift: float, audio_shift: float | None = None):
    """A clone of a flow MODEL with SD3's timestep shift; ValueError for a model that has none to set.

    audio_shift: that of the sound, for a model of video with sound (MiniMax-H3); None leaves it as it is.
    """
    old = model.get_model_object("model_sampling")
    new, clone = copy.deepcopy(old), model.clone()
    if isinstance(old, ModelSamplingAV):
        sound = old.audio_shift if audio_shift is None else audio_shift
        new.set_parameters(shift=shift, audio_shift=sound, multiplier=old.multiplier)
        # The network computes the sound's levels itself, from both.
        inner = clone.model_options["transformer_options"] = dict(clone.model_options["transformer_options"])
        inner["minimax_h3_sigma_shift_video"] = shift
        if sound is not None:
            inner["minimax_h3_sigma_shift_audio"] = sound
    elif audio_shift is not None:
        raise ValueError(
            f"audio_shift {audio_shift:g} cannot be set: only models of video with sound whose sound has a timestep "
            "shift of its own have one (MiniMax-H3); load such a model"
        )
    elif isinstance(old, ModelSamplingDiscreteFlow):
        new.set_parameters(shift=shift, multiplier=old.multiplier)
    elif isinstance(old, ModelSamplingFlux):
        # Flux writes the same curve with the exponential of its shift.
        new.set_parameters(shift=math.log(shift))
    else:
        raise ValueError(
            f"shift {shift:g} cannot be set: only flow models have a timestep shift, Cosmos Predict2 not among them, "
            f"and this one predicts {prediction_of(old)}: load a flow model such as SD3, Flux or Wan"
        )
    clone.add_object_patch("model_sampling", new)
    return clone


def sound_shifts(model) -> tuple[float, float] | None:
    """(shift, the sound's) of a MODEL whose sound has levels of its own, which follow from both; else None."""
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, ModelSamplingAV) or sampling.audio_shift is None:
        return None
    return float(sampling.shift), float(sampling.audio_shift)


def with_noise_scale(model, noise_scale: float):
    """A clone of a flow MODEL whose noise has this standard deviation; ValueError for a model that has none to set."""
    old = model.get_model_object("model_sampling")
    if not isinstance(old, ModelSamplingDiscreteFlow):
        raise ValueError(
            f"noise_scale {noise_scale:g} cannot be set: this model's noise has no scale (HiDream-O1's has); load the "
            "flow model that the preset is for"
        )
    new, clone = copy.deepcopy(old), model.clone()
    new.set_noise_scale(noise_scale)
    clone.add_object_patch("model_sampling", new)
    return clone


def _owner(kind: type, method: str) -> type:
    return next((base for base in kind.__mro__ if method in vars(base)), kind)
