"""Students whose networks are told another timestep than their level's: for one run, and for nobody else."""

from __future__ import annotations

from typing import Any

import comfy.patcher_extension
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...sampling.between import told
from ...sampling.path import NoisePath


def relabelled(options: dict[str, Any], scale: float, path: NoisePath) -> dict[str, Any]:
    """A run's model options with which the network is told the timestep of its level times `scale` (`between.told`).

    Only the network: masks, percentages and ControlNets keep the level's own. Nothing is patched on the MODEL.
    """
    if scale == 1.0:
        return options

    def tell(apply, x: Tensor, sigma: Tensor, *given: Any, **named: Any) -> Tensor:
        return apply(*told(x, sigma, scale, apply.class_obj.model_sampling, path), *given, **named)

    inner = comfy.patcher_extension.copy_nested_dicts(options.get("transformer_options", {}))
    comfy.patcher_extension.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "retort_label", tell, inner)
    return {**options, "transformer_options": inner}
