"""MODEL, CLIP and VAE of the headless host: immutable, loaded when first used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ...files.errors import UsageError
from ...models.layouts.renames import Layout
from ...sampling.levels import Prediction
from ...sampling.path import NoisePath
from ...sampling.schedule import Schedule
from ...trainers import sources

Conditioning = list  # of [tokens (1, L, C), {"pooled_output": (1, P), ...}], ComfyUI's CONDITIONING


@dataclass(frozen=True)
class LatentFormat:
    """Shape and scale of a model's latents: a stored LATENT is model latent / scale + shift, as in ComfyUI.

    channels, dims (2 image, 3 video), downscale: image pixels per latent pixel.
    """

    channels: int = 4
    dims: int = 2
    scale: float = 1.0
    shift: float = 0.0
    downscale: int = 8

    def process_in(self, latent: Tensor) -> Tensor:
        """Stored latent to model latent, any shape."""
        return (latent - self.shift) * self.scale

    def process_out(self, latent: Tensor) -> Tensor:
        """Model latent to stored latent, any shape."""
        return latent / self.scale + self.shift

    def fitted(self, latent: Tensor) -> Tensor:
        """An empty latent takes the model's channels; one with a picture must have them, else UsageError."""
        if latent.shape[1] != self.channels:
            if bool(torch.count_nonzero(latent)):
                raise UsageError(
                    f"the latent has {latent.shape[1]} channels and the model's have {self.channels}; encode the image "
                    "with the VAE that belongs to the model"
                )
            latent = latent[:, :1].expand(-1, self.channels, *latent.shape[2:]).contiguous()
        return latent.unsqueeze(2) if self.dims == 3 and latent.ndim == 4 else latent


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA file's tensors and how strongly they are applied."""

    name: str
    state: dict[str, Tensor]
    strength: float


class Network(Protocol):
    """A denoising network that takes and gives fp32, whatever it computes in."""

    device: torch.device
    dtype: torch.dtype
    # What carries adapters when it is trained: diffusers' module, the kind of LoRA files that it has, and its table;
    # architecture: as the metadata of LoRA files calls it.
    architecture: str
    kind: Literal["unet", "transformer"]
    # SD1.5 and SDXL repeat the shorter of two prompts so that both fit one batch; attention does not notice.
    repeats_context: bool

    @property
    def module(self) -> torch.nn.Module:
        """diffusers' module."""
        ...

    @property
    def table(self) -> Layout:
        """Names of its layers in files."""
        ...

    def conditions(self, tokens: Tensor, extra: dict[str, Any], shape: torch.Size) -> dict[str, Tensor]:
        """Keyword tensors (1 or B, ...) of one CONDITIONING entry for latents of a shape; `context` is the tokens."""
        ...

    def __call__(self, x: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """x (B, C, H, W), timestep (B,) -> what the network predicts, x's shape."""
        ...


class NetworkSource:
    """Loads a network with LoRAs applied, once for each set of them.

    merged: loads one that shares no weights with the others and has the LoRAs in its weights; `load` where it does so.
    bare: makes one on torch's meta device without reading a weight; where there is none, one is loaded for its shapes.
    """

    def __init__(
        self,
        load: Callable[[tuple[Lora, ...]], Network],
        merged: Callable[[tuple[Lora, ...]], Network] | None = None,
        bare: Callable[[], Network] | None = None,
    ):
        self._load, self._merged, self._bare = load, merged or load, bare
        self._loaded: dict[tuple[Lora, ...], Network] = {}

    def bare(self) -> Network:
        """A network whose weights nobody reads."""
        with torch.inference_mode(False):
            return self(()) if self._bare is None else self._bare()

    def anew(self, loras: tuple[Lora, ...]) -> Network:
        """A network of its own with LoRAs merged, to be trained; errors as `__call__`.

        It lies in host memory, wherever its `device` is: `trainers.denoiser.Denoiser.place` brings it there.
        """
        with torch.inference_mode(False):
            return self._merged(loras)

    def __call__(self, loras: tuple[Lora, ...]) -> Network:
        """The network; raises what loading raises (UsageError for files at fault)."""
        network = self._loaded.get(loras)
        if network is None:
            # Outside inference mode, so that a trainer may later take gradients through the same weights.
            with torch.inference_mode(False):
                network = self._loaded[loras] = self._load(loras)
        return network


@dataclass(frozen=True, eq=False)
class Model:
    """MODEL: a network that is loaded when it first samples, and the coordinates it samples in."""

    source: NetworkSource
    schedule: Schedule
    path: NoisePath
    prediction: Prediction
    latent: LatentFormat
    loras: tuple[Lora, ...] = ()
    origin: Origin | None = None
    # What is done to the guided x0, in order: (x0, sigma) -> x0.
    patches: tuple[Callable[[Tensor, Tensor], Tensor], ...] = ()

    @property
    def network(self) -> Network:
        """The network with this model's LoRAs."""
        return self.source(self.loras)

    def with_lora(self, lora: Lora) -> Model:
        """This model with one LoRA more."""
        return replace(self, loras=(*self.loras, lora))

    def with_sampling(self, schedule: Schedule, path: NoisePath, prediction: Prediction) -> Model:
        """This model in other coordinates."""
        return replace(self, schedule=schedule, path=path, prediction=prediction, origin=None)


@dataclass(frozen=True)
class Origin:
    """What loads a MODEL again, and the schedule that it then has."""

    base: sources.Base
    schedule: Schedule


@dataclass(frozen=True, eq=False)
class Clip:
    """CLIP: text to CONDITIONING. `encoder(text, loras)` returns (tokens (1, L, C), extra dict)."""

    encoder: Callable[[str, tuple[Lora, ...]], tuple[Tensor, dict[str, Any]]]
    loras: tuple[Lora, ...] = ()

    def encode(self, text: str) -> Conditioning:
        """CONDITIONING of a prompt with ComfyUI's weights in brackets."""
        return [list(self.encoder(text, self.loras))]

    def with_lora(self, lora: Lora) -> Clip:
        """This text encoder with one LoRA more."""
        return replace(self, loras=(*self.loras, lora))


@dataclass(frozen=True, eq=False)
class Vae:
    """VAE: images to stored latents and back. The two functions take and give (B, C, H, W), images in [0, 1].

    network: what they run; none of its own where latents are pixels. decodes: what such a network, or one like it,
    makes of latents.
    """

    encoder: Callable[[Tensor], Tensor]
    decoder: Callable[[Tensor], Tensor]
    channels: int
    downscale: int = 8
    batch: int = 64
    origin: sources.Vae | None = None
    network: Callable[[], torch.nn.Module] = torch.nn.Identity
    decodes: Callable[[Any, Tensor], Tensor] = lambda network, latents: network(latents)

    def encode(self, images: Tensor) -> Tensor:
        """IMAGE (B, H, W, C) -> latents (B, channels, H/8, W/8); sides are cut, from the middle, to multiples of 8."""
        pixels = images[..., :3]
        for dim in (1, 2):
            size = pixels.shape[dim] // self.downscale * self.downscale
            if size == 0:
                raise UsageError(
                    f"an image of {images.shape[2]} x {images.shape[1]} pixels is too small for this VAE; "
                    f"both sides must be at least {self.downscale}"
                )
            pixels = pixels.narrow(dim, (pixels.shape[dim] - size) // 2, size)
        return torch.cat([self.encoder(part.movedim(-1, 1)) for part in pixels.split(self.batch)])

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, channels, h, w) -> IMAGE (B, 8h, 8w, 3), cut to [0, 1]."""
        if latents.ndim == 5:
            latents = latents[:, :, 0]
        if latents.shape[1] != self.channels:
            raise UsageError(
                f"the latents have {latents.shape[1]} channels and this VAE reads {self.channels}; "
                "connect the VAE that belongs to the model"
            )
        images = torch.cat([self.decoder(part) for part in latents.split(self.batch)])
        return images.movedim(1, -1).clamp(0.0, 1.0)
