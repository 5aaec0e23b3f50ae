"""A search inside one run of a ComfyUI GUIDER, so that its loading, hooks, patches and guidance are core's own."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import torch
from comfy.samplers import CFGGuider, KSamplerX0Inpaint, Sampler
from torch import Tensor

from ..prior import Job, Prior, first_latent, identity
from .coordinates import path_of
from .guiders import branches, parts
from .sampler import KeepInVP

_log = logging.getLogger("retort.search")
CANCELLED = comfy.model_management.InterruptProcessingException
# With these in a condition core looks at the first level of a batch only.
_LEVEL_BOUND = {"control", "hooks", "timestep_start", "timestep_end", "gligen", "additional_models", "default"}


class SearchSampler(Sampler):
    """A SAMPLER that lets a job do the sampling."""

    def __init__(self, job: Job):
        self.job = job

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        """What a guider calls with `noise` (B, ...) of equal rows; gives back what the job does."""
        network = model_wrap.inner_model
        path = path_of(network.model_sampling)
        model = (KeepInVP if path.kind == "VP" else KSamplerX0Inpaint)(model_wrap, sigmas)
        # One row for all candidates: the area that is kept has the same noise in each, which is the first one's.
        model.latent_image, model.noise = latent_image[:1], noise[:1]
        mask = None if denoise_mask is None else denoise_mask[:1]
        top = self.max_denoise(model_wrap, sigmas)
        needed = network.memory_required([2 * noise.shape[0], *noise.shape[1:]])
        least = network.memory_required(list(noise.shape))

        def again() -> None:
            comfy.model_management.load_models_gpu(
                [model_wrap.model_patcher, *model_wrap.loaded_models],
                memory_required=needed,
                minimum_memory_required=least,
            )

        found = self.job(
            Prior(
                model=model,
                path=path,
                sigmas=sigmas,
                shape=tuple(noise.shape[1:]),
                first=first_latent(path, sigmas[0], latent_image[:1], top),
                stored=lambda x0: network.process_latent_out(x0.float()),
                mixed_levels=_plain(model_wrap, extra_args["model_options"]),
                calls_per_eval=branches(model_wrap, model_wrap.conds),
                identity=identity((model_wrap.cfg, *parts(model_wrap))),
                batch=_fitting(model_wrap.model_patcher, tuple(noise.shape), noise.device),
                again=again,
                extra_args={**extra_args, "denoise_mask": mask},
            )
        )
        return found.to(noise.device)


def latents_of(guider, latent: dict[str, Any]) -> Tensor:
    """See `hosts.api`."""
    samples = latent["samples"]
    if samples.is_nested:
        raise ValueError("latent holds several latents in one (video with sound), which a search cannot branch on")
    spacial, temporal = latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
    return comfy.sample.fix_empty_latent_channels(guider.model_patcher, samples, spacial, temporal)


def latents_out(guider, x0: Tensor) -> Tensor:
    """See `hosts.api`."""
    out = guider.model_patcher.model.process_latent_out(x0.float())
    return out.to(comfy.model_management.intermediate_device())


def search(guider, samples: Tensor, mask: Tensor | None, sigmas: Tensor, noise: Tensor, batch: int, seed: int,
           job: Job) -> Tensor:  # fmt: skip
    """See `hosts.api`."""
    row = (batch, *(1,) * (samples.ndim - 1))
    found = guider.sample(
        noise.repeat(row), samples.repeat(row), SearchSampler(job), sigmas, denoise_mask=mask, callback=None,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed,
    )  # fmt: skip
    return found.to(comfy.model_management.intermediate_device())


def _fitting(patcher, shape: tuple[int, ...], device: torch.device) -> int:
    """The batch, halved until what core estimates for one condition of it fits beside the loaded weights.

    Weights that page by themselves make room, and core counts what they take as free.
    """
    batch, row = shape[0], list(shape[1:])
    if device.type == "cpu":
        return batch
    free = patcher.get_free_memory(device)
    while batch > 1 and patcher.model.memory_required([batch, *row]) > free:
        batch //= 2
    if batch < shape[0]:
        _log.warning("%d latents at once instead of %d: more do not fit into memory", batch, shape[0])
    return batch


def _plain(guider, options: dict[str, Any]) -> bool:
    """Whether nothing in this run could look at the first level of a batch alone."""
    known = type(guider).predict_noise is CFGGuider.predict_noise
    inner = options.get("transformer_options", {})
    patched = set(options) - {"transformer_options", "to_load_options", "disable_cfg1_optimization"} or any(
        inner.get(name) for name in ("patches", "patches_replace", "wrappers", "callbacks")
    )
    bound = any(_LEVEL_BOUND & set(cond) for conds in guider.conds.values() for cond in conds)
    return known and not patched and not bound
