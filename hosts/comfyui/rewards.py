"""Reward networks under ComfyUI's model management: loaded before each use, offloaded when others need the memory."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import torch
from torch import nn


class _Placed(nn.Module):
    """ModelPatcher writes `device` on what it holds, which is a read-only property of transformers' models."""

    def __init__(self, network: nn.Module, device: torch.device):
        super().__init__()
        self.network = network
        self.device = device


class Held:
    """See `rewards.contract.Holder`."""

    def __init__(self, network: nn.Module):
        self.network = network.eval().requires_grad_(False)
        away = comfy.model_management.unet_offload_device()
        # transformers' layers cannot be streamed in pieces, so this is the patcher that loads them whole and not
        # CoreModelPatcher, which on some machines is its dynamic form.
        self.patcher = comfy.model_patcher.ModelPatcher(
            _Placed(self.network, away),
            load_device=comfy.model_management.get_torch_device(),
            offload_device=away,
        )

    def load(self) -> torch.device:
        """To the GPU, others making room; nothing happens where it is there already."""
        # Weights moved under inference mode could no longer give gradients to a picture.
        with torch.inference_mode(False):
            comfy.model_management.load_models_gpu([self.patcher], force_full_load=True)
        return self.patcher.load_device

    def offload(self) -> None:
        """Off the GPU, and off ComfyUI's list of loaded models."""
        loaded = comfy.model_management.current_loaded_models
        with torch.inference_mode(False):
            for i in reversed(range(len(loaded))):
                if loaded[i].model is self.patcher:
                    loaded.pop(i).model_unload()
            self.patcher.detach()
        comfy.model_management.soft_empty_cache()
