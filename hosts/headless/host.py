"""What nodes ask of the headless host; `hosts.api` says what each function promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files import weights as files
from ...sampling.path import NoisePath
from ...sampling.schedule import FlowSchedule, FluxSchedule, Schedule
from ..methods import Method
from . import embedded as _embedded
from . import folders, guider, job_base, rewards, training, work
from . import outline as _outline
from .folders import EMBEDDED
from .guider import Guider
from .model import Conditioning, Lora, Model, Prediction
from .noise import RandomNoise

NAME = "headless"

embedded = _embedded.load
trainable = training.trainable
outline = _outline.Outline
outlined_decoder = _outline.outlined_decoder
from_header = _outline.from_header
training_session = training.training_session
empty_latent_shape = training.empty_latent_shape
output_change = training.output_change
decode = work.decode
differentiable_decoder = work.differentiable_decoder
encode_images = work.encode_images
encode_text = work.encode_text
progress = work.Progress
check_cancelled = work.check_cancelled
free_memory = work.free_memory
bf16 = work.bf16
make_room = work.make_room
pin = work.pin
unpin = work.unpin
lora_names = work.lora_names
loras_folder = work.loras_folder
read_lora = work.read_lora
describe_base = job_base.describe_base
describe_vae = job_base.describe_vae
merge_base = job_base.merge_base
load_base = job_base.load_base
load_vae = job_base.load_vae
job_arguments = job_base.job_arguments
runs_folder = work.runs_folder
latents_in = work.latents_in
statistics_folders = work.statistics_folders
input_folders = work.input_folders
hold = rewards.hold
rewards_folders = rewards.rewards_folders
captioners_folders = work.captioners_folders
CANCELLED = KeyboardInterrupt
say = work.say
cfgs = guider.cfgs


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


def with_x0_patch(model: Model, patch: Callable[[Tensor, Tensor], Tensor]) -> Model:
    """The MODEL whose guided x0 goes through patch(x0, sigma (B,))."""
    return replace(model, patches=(*model.patches, patch))


def method_sampler(method: Method) -> Method:
    """See `hosts.api`."""
    return method


def method_of(sampler: Method) -> Method:
    """See `hosts.api`."""
    return sampler


def latents_of(guider: Guider, latent: dict[str, Any]) -> Tensor:
    """See `hosts.api`."""
    return guider.model.latent.fitted(latent["samples"])


def latents_out(guider: Guider, x0: Tensor) -> Tensor:
    """See `hosts.api`."""
    return guider.model.latent.process_out(x0.float())


def at_cfg(guider: Guider, cfg: float) -> Guider:
    """See `hosts.api`."""
    return Guider(guider.model, guider.positive, guider.negative, cfg)


def random_noise(seed: int) -> RandomNoise:
    """NOISE of a seed."""
    return RandomNoise(seed)


def cfg_guider(model: Model, positive: Conditioning, negative: Conditioning | None, cfg: float) -> Guider:
    """GUIDER with classifier-free guidance; ValueError when cfg needs the negative that is not there."""
    if negative is None and cfg != 1:
        raise ValueError(f"cfg {cfg:g} compares with a negative prompt: connect `negative`")
    return Guider(model, positive, negative, cfg)


def branches(guider: Guider, leg: bool = False) -> int:
    """Conditions that are run for one latent, the same wherever the guider stands."""
    return sum(map(len, guider.branches()))


def with_lora(model: Model, name: str, strength: float) -> Model:
    """The MODEL with a LoRA file at this strength; ValueError where it does not fit."""
    if strength == 0:
        return model
    patched = model.with_lora(Lora(name, files.load(folders.current().model("loras", name)), strength))
    # Loaded here, so that a LoRA that does not fit is told at once.
    return patched if patched.network is not None else model


def sample(
    guider: Guider, sampler: Method, sigmas: Tensor, latent: dict[str, Any], seed: int, noise: Tensor | None = None
) -> Tensor:
    """See `hosts.api`."""
    start = {**latent, "samples": latents_of(guider, latent)}
    noise = RandomNoise(seed).generate_noise(start) if noise is None else noise
    with torch.inference_mode():
        return guider.sample(noise, start["samples"], sampler, sigmas, latent.get("noise_mask"), None, seed)


def models_folder() -> Path:
    """Folder of the embedded weights."""
    return EMBEDDED


def add_model_folders() -> None:
    """The headless loaders know the folder already."""


def search_records() -> None:
    """Nobody looks."""


def add_routes(sets: Callable[[], Path]) -> None:
    """No page is served here: what waits is answered in ComfyUI, or through `preferences.tickets`."""
