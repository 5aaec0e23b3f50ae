"""The model that comes with Retort, as MODEL, CLIP and VAE of the headless host."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from ...files.errors import UsageError
from ...models import autoencoder, layout, loader, text
from ...models.layouts.dit import sd3_layout
from ...models.layouts.renames import Layout
from ...sampling.path import FLOW, VE
from ...sampling.schedule import DiscreteSchedule, FlowSchedule
from ...trainers import sources
from . import photographs
from .model import Clip, LatentFormat, Lora, Model, NetworkSource, Origin, Vae
from .threads import quickest, threads
from .work import say

LATENT = LatentFormat(autoencoder.CHANNELS, scale=autoencoder.SCALE, shift=autoencoder.SHIFT)
# What stock loaders set for every SD3-layout model; the flow twin is used so everywhere.
SHIFT = 3.0
FILES = {name: variant for variant, name in loader.CHECKPOINTS.items()}


class EmbeddedNetwork:
    """The network behind `model.Network`."""

    kind: Literal["unet", "transformer"] = "transformer"
    architecture = "stable-diffusion-3"
    repeats_context = False

    def __init__(self, network: torch.nn.Module):
        self.network = network
        parameter = next(network.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype

    @property
    def module(self) -> Any:
        """diffusers' transformer inside."""
        return self.network.network

    @property
    def table(self) -> Layout:
        """Its names in files."""
        return sd3_layout(self.module.config)

    def conditions(self, tokens: Tensor, extra: dict[str, Any], shape: torch.Size) -> dict[str, Tensor]:
        """Token states and the pooled state."""
        pooled = extra.get("pooled_output")
        if pooled is None or pooled.shape[-1] != text.WIDTH or tokens.shape[-1] != text.WIDTH:
            raise UsageError("this CONDITIONING comes from another text encoder; use the CLIP of RetortEmbeddedModel")
        if shape[1] != autoencoder.CHANNELS:
            raise UsageError(f"the latent has {shape[1]} channels and the embedded model takes {autoencoder.CHANNELS}")
        layout.refuse_large(*shape[-2:])
        return {"context": tokens, "y": pooled}

    def __call__(self, x: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """x (B, 16, h, w), timestep (B,) -> (B, 16, h, w)."""
        given = {name: value.to(self.dtype) for name, value in conditions.items()}
        with threads(_threads()):
            return self.network(x.to(self.dtype), timestep, **given).float()


@cache
def _threads() -> int:
    """How many threads the embedded networks use in this process."""
    with torch.random.fork_rng(devices=[]):  # a trial must not move the run's own random numbers
        layer = torch.nn.TransformerEncoderLayer(192, 3, 768, batch_first=True).eval()
        tokens = torch.randn(8, 32, 192)
    with torch.inference_mode():
        return quickest(lambda: layer(tokens))


def load(variant: str) -> tuple[Model, Clip, Vae]:
    """MODEL, CLIP and VAE of a variant of `models.loader.CHECKPOINTS`; ValueError for an unknown one."""
    if variant == photographs.VARIANT:
        return photographs.load()
    if variant not in loader.CHECKPOINTS:
        raise ValueError(f"variant {variant!r} is not known; use one of {', '.join(loader.CHECKPOINTS)}")
    model = _model(variant)
    origin = Origin(sources.Base("embedded", variant), model.schedule)
    return replace(model, origin=origin), _clip(), replace(_vae(), origin=sources.Vae("embedded", variant))


@cache
def _model(variant: str) -> Model:
    def network(loras: tuple[Lora, ...]) -> EmbeddedNetwork:
        merged = tuple((lora.state, lora.strength) for lora in loras)
        return EmbeddedNetwork(loader.load_transformer(variant, merged, partial(say, warn=True)))

    source = NetworkSource(network)
    if variant.startswith("eps"):
        return Model(source, DiscreteSchedule(), VE, "eps", LATENT)
    return Model(source, FlowSchedule(shift=SHIFT), FLOW, "flow", LATENT)


@cache
def _clip() -> Clip:
    tokenizer = text.WordTokenizer()
    encoders: list[text.TextEncoder] = []

    def encode(prompt: str, loras: tuple[Lora, ...]) -> tuple[Tensor, dict[str, Any]]:
        if not encoders:
            with torch.inference_mode(False):
                encoders.append(loader.load_text_encoder())
        tokens, pooled = encoders[0].encode(*tokenizer.encode(prompt))
        return tokens, {"pooled_output": pooled}

    return Clip(encode)


@cache
def _vae() -> Vae:
    loaded: list[autoencoder.Autoencoder] = []

    def network() -> autoencoder.Autoencoder:
        if not loaded:
            with torch.inference_mode(False):
                loaded.append(loader.load_autoencoder())
        return loaded[0]

    # The autoencoder's own latents are the model's; stored ones are in ComfyUI's scale.
    def encode(images: Tensor) -> Tensor:
        with threads(_threads()):
            return LATENT.process_out(network().encode(images))

    def decode(latents: Tensor) -> Tensor:
        with threads(_threads()):
            return decodes(network(), latents)

    def decodes(made: Any, latents: Tensor) -> Tensor:
        return made.decode(LATENT.process_in(latents))

    return Vae(encode, decode, autoencoder.CHANNELS, network=network, decodes=decodes)
