"""A ComfyUI MODEL and VAE without weights, for a dry run: their own modules and settings, and nothing of a weight."""

from __future__ import annotations

import copy
from typing import Any

import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch
from torch import nn

from ...trainers.decoder import Decoder
from ...trainers.weightless import META, weightless_copy
from .kinds import refuse_untrainable
from .own_network import ordinary_format, set_precision
from .training import ComfyDenoiser, refuse_foreign_patches
from .work import decoder_of


class Outline:
    """See `trainers.dry_run.Outline`. compute: see `hosts.contract.Training.trainable`."""

    def __init__(self, model, compute: torch.dtype | None = None):
        refuse_foreign_patches(model)
        refuse_untrainable(model.model)
        self._model = model
        with torch.inference_mode(False):
            # Everything but the network is the model's own: levels, scales of latents, what it makes of conditions.
            self._base = _with_network(model.model, _weightless(model.model.diffusion_model))
            self._base.latent_format = ordinary_format(self._base.latent_format)
            for name, patch in model.object_patches.items():
                comfy.utils.set_attr(self._base, name, copy.deepcopy(patch))
            set_precision(self._base, compute)
        self.network: nn.Module = self._base.diffusion_model

    def denoiser(self, network: nn.Module) -> ComfyDenoiser:
        """See the contract."""
        with torch.inference_mode(False):
            base = _with_network(self._base, network)
            patcher = comfy.model_patcher.ModelPatcher(base, load_device=META, offload_device=META)
            patcher.model_options = comfy.model_patcher.create_model_options_clone(self._model.model_options)
            return ComfyDenoiser(patcher)


def _weightless(network: nn.Module) -> nn.Module:
    made = weightless_copy(network)
    for module in made.modules():
        if isinstance(module, comfy.ops.CastWeightBiasOp):
            # A MODEL that is loaded in part brings its patches here.
            comfy.model_patcher.wipe_lowvram_weight(module)
            module.comfy_force_cast_weights = False
    return made


def _with_network(base: Any, network: nn.Module) -> Any:
    made = copy.copy(base)
    made.__dict__ = dict(base.__dict__)
    made._modules = dict(base._modules)
    made.diffusion_model, made.current_patcher = network, None
    return made


def outlined_decoder(vae) -> Decoder:
    """See `hosts.contract`."""
    with torch.inference_mode(False):
        here = copy.copy(vae)
        here.device = META
        return decoder_of(here, _weightless(vae.first_stage_model))
