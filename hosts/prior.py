"""What a host lends a search: one prompt's sampler as a function of latents and levels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..sampling.path import VE, NoisePath


@dataclass(frozen=True)
class Prior:
    """The sampler that a search draws from, alive inside one run of the host's guider.

    model(x, sigma (B,), **extra_args) -> x0 with guidance and mask inside. sigmas: on the model's device. shape: of one
    latent. first: unit noise (1, ...) -> the latent at the top level. stored: x0 (B, ...) -> LATENT samples. batch: as
    many latents at once as were asked for and as memory holds. mixed_levels: whether one forward may hold several.
    calls_per_eval: network calls for one latent. identity: of model and conditions. again: to be called when other
    networks may have taken the model's place on the GPU.
    """

    model: Callable[..., Tensor]
    path: NoisePath
    sigmas: Tensor
    shape: tuple[int, ...]
    first: Callable[[Tensor], Tensor]
    stored: Callable[[Tensor], Tensor]
    mixed_levels: bool
    calls_per_eval: int
    identity: str
    batch: int
    again: Callable[[], None]
    extra_args: dict[str, Any] = field(default_factory=dict)


Job = Callable[[Prior], Tensor]
"""What happens with a prior; it returns clean latents of the model, which the host gives back as LATENT samples."""


def first_latent(path: NoisePath, sigma: Tensor, latent: Tensor, top: bool) -> Callable[[Tensor], Tensor]:
    """`Prior.first` as core scales its noise: a VE model gets the unit noise itself at its highest level (`top`).

    Core takes sigma_data to be 1 there, whatever it is.
    """
    if path.kind == "VE" and top:
        return lambda noise: VE.unit_start(sigma, noise) + latent
    return lambda noise: path.add_noise(latent, sigma, noise)


def identity(parts: Iterable[Any]) -> str:
    """A short name for a model and its conditions, the same in every session; tensors count by their numbers."""
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(repr(tuple(part.shape)).encode())
            digest.update(part.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        else:
            digest.update(f"{part!r};".encode())
    return digest.hexdigest()
