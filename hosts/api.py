"""Everything that a node may ask of whoever runs it; nodes import nothing else from `hosts`.

`io`, `ui` and `ComfyExtension` are the names of `comfy_api.latest`. `host` is a module with these functions:

* `noise_path(model) -> NoisePath`: the coordinates of the model; ValueError names a sampling class that has none.
* `schedule(model)`: its model_sampling object (`sigmas`, `sigma_max`, `timestep(sigma)`, `sigma(timestep)`).
* `prediction(model) -> "eps" | "v" | "flow" | "x0" | "edm"`: what the network predicts.
* `latent_format(model) -> (channels, dims)`: 2 dims for images, 3 for video.
* `with_shift(model, shift) -> MODEL`: a clone of a flow model with this timestep shift.
* `distilled_sampler(mode, start, preset=None) -> SAMPLER`: few-step sampling (`sampling.distilled`); a Preset tells the
  level that its student starts from, so that a grid which begins below it is taken as image to image.
* `method_sampler(method) -> SAMPLER`: a `hosts.methods.Method`, such as Dopri5 or Structure.
* `teleport_sampler(inner, plan) -> SAMPLER`: the SAMPLER `inner`, begun where a `sampling.teleport.Teleport` says.
* `with_x0_patch(model, patch) -> MODEL`: whose guided x0 goes through `patch(x0, sigma (B,))` at every call.
* `random_noise(seed) -> NOISE`: core's RandomNoise.
* `latents_in(model, samples) -> Tensor`: LATENT samples (B, C, ...) in the model's own scale, fp32 on the CPU;
  ValueError for those of another model.
* `statistics_folders() -> list[Path]`: where Gaussian statistics lie, the first being where new ones belong.
* `input_folders() -> list[Path]`: where pictures for input lie.
* `cfg_guider(model, positive, negative, cfg) -> GUIDER`: `negative` may be None where cfg is 1.
* `embedded(variant) -> (MODEL, CLIP, VAE)`: the small model that comes with Retort.
* `models_folder() -> Path`: where its weights lie.
* `add_model_folders()`: shows that folder to the host's own loaders.
* `add_routes(sets)`: lets the host's page, where there is one, look at runs (`hosts.jobs.view`) and searches, and
  answer what waits beside the preference sets in `sets()`.

For training:

* `trainable(model, compute=None)`: a `trainers.denoiser.Denoiser` on a network of its own, the model's LoRAs in its
  weights; compute: precision of its arithmetic, None as the host samples, but bf16 or fp32 in place of fp16, in which
  gradients overflow. Besides the contract it has
  `encode(conditioning, shape, input="positive")` (what `join` takes; shape (1, C, H, W)), `latents_in(samples)`,
  `latents_out(x0)`, `preview(x0) -> IMAGE` without a VAE, `to_file(lora)` and `from_file(state)` (names in LoRA files),
  `base_hash`, `architecture` and `release()`. ValueError for patches that cannot be trained through.
* `outline(model, compute=None) -> trainers.dry_run.Outline`: the same without its weights, none of which is read, and
  `outlined_decoder(vae)` likewise: for counting what a run takes (`hosts.training.planning`).
* `from_header(path, width, height, frames, tokens)`: (MODEL without weights, a CONDITIONING entry of so many tokens, 0
  for the usual number, shape of its latents), from a file's header alone. ValueError for one that is not known.
* `training_session()`: context in which gradients flow, under whatever mode the node runs.
* `empty_latent_shape(model, samples) -> (C, ...)`: of the latents that an empty LATENT stands for.
* `encode_text(clip, text) -> CONDITIONING`, `encode_images(vae, images) -> LATENT`, `decode(vae, samples) -> IMAGE`.
* `differentiable_decoder(vae) -> trainers.decoder.Decoder`: function from stored latents to images, with gradients.
* `output_change(model, path, dataset) -> float`: largest change that a LoRA file makes to one output of the model.
* `progress(total)`: object with `step(done, preview=None, text="")`; preview is a PIL image.
* `check_cancelled()`: raises the host's own exception when the user has cancelled.
* `free_memory() -> bytes | None`: of the accelerator; None where there is none.
* `make_room()`: gives back what the host itself holds of the accelerator's memory, for another process.
* `pin(tensor) -> bool`: makes memory of the host such that the device fetches from it by itself, False where it cannot
  or has no more to give; `unpin(tensor)` undoes that.
* `bf16() -> bool`: whether networks had better compute in bf16 here; where a device only emulates it, they had not.
* `lora_names() -> list[str]`, `read_lora(name) -> dict`: the LoRA files that the host lists, and one's tensors.
* `loras_folder() -> Path`, `runs_folder() -> Path`: where LoRAs and runs are written.
* For jobs: `describe_base(model) -> Base | None`, `describe_vae(vae) -> Vae | None` (`trainers.sources`; None for what
  no file names), `merge_base(model, folder) -> Base` (written beside the job, ValueError where that cannot be),
  `load_base(base, folder) -> MODEL`, `load_vae(vae) -> VAE`, `job_arguments() -> list[str]` (for `hosts/job.py`),
  `NAME` ("comfyui" or "headless").
* In ComfyUI alone, under these: `describe(model) -> dict | None` (what loads it again, None where patches cannot be
  named), `save_merged(model, path) -> dict` (its network with the patches merged), `load_described(dict) -> MODEL`.

For rewards (`hosts.rewards.kinds.make(host, kind, settings) -> Reward` puts them together):

* `hold(network) -> rewards.contract.Holder`: the network under the host's memory management.
* `rewards_folders() -> list[Path]`: where reward models lie, the first being where new ones belong.

For restoration (`hosts.restoration.run.run(host, ...)`, `hosts.restoration.captions.run(host, ...)`):

* `captioners_folders() -> list[Path]`: where captioning models lie.

For searches (`hosts.search.run.run(host, ...)` puts them together):

* `latents_of(guider, latent) -> (B, C, ...)`: a LATENT's samples, an empty one with the channels of the guider's model.
* `latents_out(guider, x0) -> LATENT samples`: of the model's own latents (B, C, ...).
* `search(guider, samples, mask, sigmas, noise, batch, seed, job) -> LATENT samples`: one sampling run of the guider on
  one latent `samples` (1, ...), sized for `batch` of them, in which `job` (`hosts.prior.Job`) does the sampling. noise
  (1, ...): the first candidate's, and that of the area which a mask keeps.
* `search_records() -> Path | None`: where a page finds what a search has found so far (`hosts.search.record`).
* `CANCELLED`: the exception by which a user stops what runs.

For reflection (`hosts.reflection.compare(host, ...)` puts runs side by side):

* `reflection_sampler(weak, config, reflecting=None) -> SAMPLER` (a `REFLECTION_SAMPLER`, with these as attributes):
  guiders that run inside the sampling of the guider which the SAMPLER is given to. ValueError, when sampled, for a pair
  that cannot be.
* `branches(guider, leg=False) -> int`: network calls for one latent; a leg at cfg 0 runs its negative branch alone.
* `cfgs(guiders) -> tuple | None`: their cfg where nothing else differs. `at_cfg(guider, cfg) -> GUIDER`.
* `with_lora(model, name, strength) -> MODEL`.
* `sample(guider, sampler, sigmas, latent, seed) -> LATENT samples`: as SamplerCustomAdvanced with RandomNoise.
* `say(text, warn=False)`: into the log, and on the running node where the host shows texts.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from . import compare, methods, noise, reflection, statistics
from .jobs import starter
from .restoration import captions
from .restoration import compare as picture_compare
from .restoration import run as restoration
from .rewards import kinds as rewards
from .search import run as search
from .training import plan_report as plans
from .training import run as training

# The process tells who runs us: ComfyUI has imported its API long before it loads packs. That ComfyUI could be imported
# says nothing, since the command line may be started inside a ComfyUI checkout.
IN_COMFYUI = "comfy_api" in sys.modules

if TYPE_CHECKING or not IN_COMFYUI:
    from ..graphs.api import io, ui
    from ..graphs.api.io import ComfyExtension
    from .headless import host
else:
    from comfy_api.latest import ComfyExtension, io, ui

    from .comfyui import host

__all__ = [
    "IN_COMFYUI", "ComfyExtension", "captions", "compare", "host", "io", "methods", "noise", "picture_compare", "plans",
    "reflection", "restoration", "rewards", "search", "starter", "statistics", "training", "ui",
]  # fmt: skip
