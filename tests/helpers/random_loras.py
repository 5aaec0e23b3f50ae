"""LoRAs with random weights for a model of the headless host, as a training would write them."""

from __future__ import annotations

import torch
from torch import Tensor

from retort.hosts import api
from retort.trainers.adapters import LoraConfig


def random_loras(model, count: int) -> list[dict[str, Tensor]]:
    """The tensors of so many files."""
    denoiser = api.host.trainable(model)
    denoiser.adapters.add("student", LoraConfig(rank=2), 0)
    made = []
    for seed in range(count):
        for key, weight in denoiser.adapters.parameters("student").items():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=0.05, generator=torch.Generator().manual_seed(seed))
        made.append({key: w.clone() for key, w in denoiser.to_file(denoiser.adapters.lora("student")).items()})
    return made
