"""A ComfyUI MODEL without weights, for a dry run: its own modules and settings, and not a byte of its weights."""

from __future__ import annotations

import copy
from typing import Any

import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor, nn

from ...trainers.weightless import META, weightless_copy
from .training import ComfyDenoiser, refuse_foreign_patches


class Outline:
    """See `trainers.dry_run.Outline`. compute: see `hosts.api.trainable`."""

    def __init__(self, model, compute: torch.dtype | None = None):
        refuse_foreign_patches(model)
        self._model, self._compute = model, compute

        def cast(weight: Tensor) -> torch.dtype | None:
            # Loaded once in the precision of its arithmetic, where that is another 16 bits than the file's.
            return compute if compute is not None and weight.dtype in (torch.float16, torch.bfloat16) else None

        with torch.inference_mode(False):
            self.network = weightless_copy(model.model.diffusion_model, cast)

    def denoiser(self, network: nn.Module) -> ComfyDenoiser:
        """See the contract."""
        with torch.inference_mode(False):
            return ComfyDenoiser(self._patcher(network))

    def _patcher(self, network: nn.Module) -> Any:
        # Everything but the network is the model's own: levels, scales of latents, what it makes of conditions.
        base = copy.copy(self._model.model)
        base.__dict__ = dict(base.__dict__)
        base._modules = dict(base._modules)
        base.diffusion_model, base.current_patcher = network, None
        for name, patch in self._model.object_patches.items():
            comfy.utils.set_attr(base, name, copy.deepcopy(patch))
        if self._compute is not None and self._compute != base.get_dtype_inference():
            base.manual_cast_dtype = self._compute
        patcher = comfy.model_patcher.ModelPatcher(base, load_device=META, offload_device=META)
        patcher.model_options = comfy.model_patcher.create_model_options_clone(self._model.model_options)
        return patcher
