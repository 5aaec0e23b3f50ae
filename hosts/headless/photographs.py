"""The photograph restorer that comes with Retort, as MODEL, CLIP and VAE of this host; its latents are pixels."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...files.errors import UsageError
from ...models import loader, photo_network
from ...models.layouts.renames import Layout
from ...sampling.path import FLOW
from ...sampling.schedule import FlowSchedule
from ...trainers import sources
from .model import Clip, LatentFormat, Lora, Model, NetworkSource, Origin, Vae
from .networks import Diffusers

VARIANT = "photographs"
LATENT = LatentFormat(photo_network.CHANNELS, downscale=1)


class Network(Diffusers):
    """The network behind `model.Network`, with LoRAs merged."""

    architecture = "retort-photographs"

    def __init__(self, module: photo_network.PhotoNetwork, loras: tuple[Lora, ...]):
        table = Layout()
        for name, _ in module.named_modules():
            table.add(name, name)
        super().__init__(module, table)
        self.merge(loras)

    def conditions(self, tokens: Tensor, extra: dict[str, Any], shape: torch.Size) -> dict[str, Tensor]:
        """The pooled caption."""
        pooled = extra.get("pooled_output")
        if pooled is None or pooled.shape[-1] != photo_network.WIDTH:
            raise UsageError(
                "this CONDITIONING comes from another text encoder; use the CLIP of RetortEmbeddedModel, variant "
                f"{VARIANT}"
            )
        if shape[1] != photo_network.CHANNELS:
            raise UsageError(f"the latent has {shape[1]} channels and the photographs' model takes pixels")
        return {"context": tokens, "y": pooled}

    def forward(self, x: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """x (B, 3, H, W), timestep (B,) -> (B, 3, H, W)."""
        return self.module(x, timestep, conditions["y"])


def model_of(module: photo_network.PhotoNetwork | None) -> Model:
    """MODEL of a network, None for the one that comes with Retort."""

    def network(loras: tuple[Lora, ...]) -> Network:
        return Network(copy.deepcopy(module) if module is not None else loader.load_photographs()[0], loras)

    return Model(NetworkSource(network), FlowSchedule(shift=1.0), FLOW, "flow", LATENT)


@cache
def load() -> tuple[Model, Clip, Vae]:
    """MODEL, CLIP and VAE."""
    model = model_of(None)
    origin = Origin(sources.Base("embedded", VARIANT), model.schedule)
    return replace(model, origin=origin), _clip(), Vae(
        lambda images: 2 * images - 1, lambda latents: (latents + 1) / 2, photo_network.CHANNELS, 1,
        origin=sources.Vae("embedded", VARIANT),
    )  # fmt: skip


def _clip() -> Clip:
    tokenizer = photo_network.PhotoTokenizer()
    encoders: list[photo_network.PhotoText] = []

    def encode(prompt: str, loras: tuple[Lora, ...]) -> tuple[Tensor, dict[str, Any]]:
        if not encoders:
            with torch.inference_mode(False):
                encoders.append(loader.load_photographs()[1])
        tokens, pooled = encoders[0].encode(*tokenizer.encode(prompt))
        return tokens, {"pooled_output": pooled}

    return Clip(encode)
