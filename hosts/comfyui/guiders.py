"""What can be asked of a ComfyUI GUIDER: how often its network runs for a latent, and what it guides with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from comfy.samplers import CFGGuider
from torch import Tensor

from ...sampling.prior import identity

# A patch among these wants both branches, or makes something of them.
_GUIDANCE = (
    "sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function", "sampler_calc_cond_batch_function",
    "disable_cfg1_optimization",
)  # fmt: skip


def plain_cfg(guider: Any) -> bool:
    """Whether a guider guides as core's CFGGuider does, with nothing patched into its guidance."""
    own = type(guider).predict_noise is CFGGuider.predict_noise
    return own and not any(guider.model_options.get(name) for name in _GUIDANCE)


def unconditional(guider: Any) -> bool:
    """Whether a guider's answer is that of its negative branch alone: cfg 0, of which core runs both branches."""
    return plain_cfg(guider) and guider.cfg == 0 and bool(guider.original_conds.get("negative"))


def branches(guider: Any, conds: Mapping[str, Sequence[Any]]) -> int:
    """Conditions that core runs for one latent, those whose time has not come included."""
    used = dict(conds)
    core = type(guider).predict_noise is CFGGuider.predict_noise
    if core and math.isclose(guider.cfg, 1.0) and not guider.model_options.get("disable_cfg1_optimization"):
        used.pop("negative", None)
    return max(1, sum(len(entries) for entries in used.values()))


def parts(guider: Any) -> Iterator[Any]:
    """What names a guider's model and conditions, cfg apart."""
    patcher = guider.model_patcher
    yield type(patcher.model).__name__
    yield type(patcher.get_model_object("model_sampling")).__mro__[1].__name__
    for name, weights in sorted(patcher.patches.items()):
        yield name, [round(float(patch[0]), 6) for patch in weights]
    yield next(patcher.model.diffusion_model.parameters()).flatten()[:64]
    for branch, entries in sorted(guider.original_conds.items()):
        yield branch
        for entry in entries:
            yield from (entry[name] for name in ("cross_attn", "pooled_output") if isinstance(entry.get(name), Tensor))
            yield sorted(name for name in entry if name not in ("uuid", "model_conds"))


def cfgs(guiders: Sequence[Any]) -> tuple[float, ...] | None:
    """See `hosts.contract`."""
    first = guiders[0]
    for guider in guiders:
        shared = guider.model_patcher.is_clone(first.model_patcher)
        if not (plain_cfg(guider) and shared and identity(parts(guider)) == identity(parts(first))):
            return None
    return tuple(float(guider.cfg) for guider in guiders)
