"""What a search asks of a run of a ComfyUI GUIDER, whose loading, hooks, patches and guidance are core's own."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import comfy.model_management
import torch
from comfy.samplers import CFGGuider

from ...sampling.prior import identity
from ..methods import Run
from .guiders import branches, parts
from .kinds import one_level_only, refuse_unsearchable
from .parts import one_at_a_time, one_level_in_a_call

_log = logging.getLogger("retort.search")
# With these in a condition core looks at the first level of a batch only.
_LEVEL_BOUND = {"control", "hooks", "timestep_start", "timestep_end", "gligen", "additional_models", "default"}


def as_prior(run: Run, model_wrap: Any, options: dict[str, Any], standing: list[Any]) -> Run:
    """The run with what a search asks: how many latents at once, at which levels, of what, and how often it counts.

    standing: filled while further guiders stand beside this one, whose networks are fetched when they are asked.
    """
    network, device = model_wrap.inner_model, run.noise.device
    refuse_unsearchable(network)
    batch = 1 if one_at_a_time(network) else run.batch
    shape = (batch, *run.shape)
    needed = network.memory_required([2 * batch, *run.shape])
    least = network.memory_required(list(shape))

    def again() -> None:
        if standing:
            standing[-1].disturbed()
            return
        comfy.model_management.load_models_gpu(
            [model_wrap.model_patcher, *model_wrap.loaded_models],
            memory_required=needed,
            minimum_memory_required=least,
        )

    return replace(
        run,
        mixed_levels=mixed_levels(model_wrap, options),
        calls_per_eval=branches(model_wrap, model_wrap.conds),
        identity=identity((model_wrap.cfg, *parts(model_wrap))),
        batch=_fitting(model_wrap.model_patcher, shape, device),
        again=again,
    )


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


def mixed_levels(guider, options: dict[str, Any]) -> bool:
    """Whether nothing in this run could look at the first level of a batch alone."""
    known = type(guider).predict_noise is CFGGuider.predict_noise
    inner = options.get("transformer_options", {})
    patched = set(options) - {"transformer_options", "to_load_options", "disable_cfg1_optimization"} or any(
        inner.get(name) for name in ("patches", "patches_replace", "wrappers", "callbacks")
    )
    bound = any(_LEVEL_BOUND & set(cond) for conds in guider.conds.values() for cond in conds)
    network = guider.inner_model
    alone = one_level_only(network) or one_at_a_time(network)
    alone = alone or one_level_in_a_call(network, len(network.latent_shapes or ()) > 1)
    return known and not patched and not bound and not alone
