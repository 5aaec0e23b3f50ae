"""What nodes ask of ComfyUI; `hosts.api` says what each function promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
from torch import Tensor

from ...sampling.path import NoisePath
from ..methods import Method
from . import bare as _bare
from . import (
    base,
    guard,
    guiders,
    job_base,
    picker_routes,
    preference_routes,
    rewards,
    run_routes,
    search_routes,
    training,
    work,
)
from . import embedded as _embedded
from . import outline as _outline
from . import search as _search
from .coordinates import Prediction, path_of, prediction_of
from .coordinates import with_shift as with_shift
from .sampler import MethodSampler

NAME = "comfyui"

embedded = _embedded.load
trainable = training.trainable
outline = _outline.Outline
from_header = _bare.from_header
outlined_decoder = _outline.outlined_decoder
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
search_records = work.search_records
latents_in = work.latents_in
statistics_folders = work.statistics_folders
input_folders = work.input_folders
describe = base.describe
save_merged = base.save_merged
load_described = base.load_described
hold = rewards.hold
rewards_folders = rewards.rewards_folders
captioners_folders = work.captioners_folders
latents_of = _search.latents_of
latents_out = _search.latents_out
CANCELLED = _search.CANCELLED
say = work.say
branches = guiders.branches_of
cfgs = guiders.cfgs
at_cfg = guiders.at_cfg


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


def with_x0_patch(model, patch: Callable[[Tensor, Tensor], Tensor]):
    """A clone of the MODEL whose guided x0 goes through patch(x0, sigma (B,))."""
    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(lambda args: patch(args["denoised"], args["sigma"]))
    return clone


def method_sampler(method: Method) -> MethodSampler:
    """SAMPLER of a method."""
    return MethodSampler(method)


def method_of(sampler) -> Method | None:
    """See `hosts.api`."""
    return sampler.method if isinstance(sampler, MethodSampler) else None


def random_noise(seed: int):
    """Core's NOISE of a seed."""
    # Core reads its own nodes by file path, so this is a second copy, made when it is first needed.
    from comfy_extras.nodes_custom_sampler import Noise_RandomNoise

    return Noise_RandomNoise(seed)


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


def with_lora(model, name: str, strength: float):
    """A clone of the MODEL with a LoRA file at this strength; ValueError where it changes nothing there."""
    if strength == 0:
        return model
    patched = comfy.sd.load_lora_for_models(model, None, work.read_lora(name), strength, 0)[0]
    if patched.patches_uuid == model.patches_uuid:
        raise ValueError(f"the LoRA {name} has no layer of this model: choose one that was made for it")
    return patched


def sample(
    guider, sampler, sigmas: Tensor, latent: dict[str, Any], seed: int, noise: Tensor | None = None
) -> Tensor:
    """See `hosts.api`."""
    samples = latents_of(guider, latent)
    if noise is None:
        noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    found = guider.sample(
        noise, samples, sampler, sigmas, denoise_mask=latent.get("noise_mask"), callback=None,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed,
    )  # fmt: skip
    return found.to(comfy.model_management.intermediate_device())


def models_folder() -> Path:
    """Folder of the embedded weights."""
    return _embedded.FOLDER


def add_model_folders() -> None:
    """Show the embedded weights to the stock loaders, and folders of ours below models to users."""
    _embedded.add_model_folders()
    rewards.add_folder()
    work.add_captioners_folder()
    work.add_statistics_folder()


def add_routes(sets: Callable[[], Path]) -> None:
    """See `hosts.api`; nothing where no server runs."""
    from server import PromptServer

    if "instance" in vars(PromptServer):
        guard.listen_at(comfy.cli_args.args.listen.split(","))
        table = PromptServer.instance.routes
        picker_routes.add(table, sets)
        preference_routes.add(table, sets)
        run_routes.add(table, work.runs_folder)
        search_routes.add(table, work.search_records, work.saved_searches, lambda: work.input_folders()[0])
