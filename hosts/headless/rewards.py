"""Reward networks without ComfyUI: on the device while they score."""

from __future__ import annotations

import torch
from torch import nn

from .device import device


class Held:
    """See `rewards.contract.Holder`."""

    def __init__(self, network: nn.Module):
        self.network = network.eval().requires_grad_(False)

    def load(self) -> torch.device:
        """To the GPU where there is one; it stays there."""
        where = device()
        with torch.inference_mode(False):
            self.network.to(where)
        return where

    def offload(self) -> None:
        """Back to the CPU."""
        with torch.inference_mode(False):
            self.network.to("cpu")
