"""The prior: one prompt's model along one schedule, from which samplers and searches draw."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .path import VE, NoisePath
from .standard import Model


@dataclass(frozen=True, eq=False)
class Prior:
    """What may be known of a model in one sampling run.

    model(x, sigma (B,), **extra_args) -> x0, guidance and mask inside. sigmas: 1-D, descending, on the model's device
    and in its dtype. shape: of one latent, without batch. latent (B or 1, ...): the clean latent image in the model's
    scale; None for an empty one. top: the first level is the model's highest. batch: latents per forward, as many as
    are wanted and memory holds. mixed_levels: latents at different levels may share a forward. calls_per_eval: network
    calls that an evaluation of one latent takes, one for each guidance branch. identity: names model and conditions.
    """

    model: Model
    path: NoisePath
    sigmas: Tensor
    shape: tuple[int, ...]
    latent: Tensor | None = None
    top: bool = False
    extra_args: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    mixed_levels: bool = False
    calls_per_eval: int = 1
    identity: str = ""

    def first(self, noise: Tensor) -> Tensor:
        """The latent (B, ...) at the first level, of unit noise (B, ...), scaled as ComfyUI scales it.

        There a VE model gets the unit noise itself at its highest level, but for a rectified flow; ComfyUI takes
        sigma_data to be 1 for that, whatever it is.
        """
        latent = torch.zeros_like(noise) if self.latent is None else self.latent
        if self.path.kind == "VE" and self.top and not self.path.rectified:
            return VE.unit_start(self.sigmas[0], noise) + latent
        return self.path.add_noise(latent, self.sigmas[0], noise)

    def carried(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x at level sigma (0-d) as a LATENT that still holds noise keeps it: with its clean part in full.

        Without further noise a sampler that begins at sigma begins at x. ValueError at a flow's level 1: it has none.
        """
        if self.path.kind == "FLOW":
            if float(sigma) >= 1:
                raise ValueError(
                    "sigmas end at level 1, where a flow model's latent is noise alone, of which nothing can be handed "
                    "on: let them go further down, by a higher denoise, more steps or a later split"
                )
            return x / (1.0 - sigma)
        return x * torch.sqrt(1.0 + sigma**2) if self.path.kind == "VP" else x

    def finished(self, x: Tensor) -> Tensor:
        """The same for x at the last level, where a sampler ends."""
        return self.carried(x, self.sigmas[-1])


def require_steps(sigmas: Tensor, purpose: str) -> None:
    """ValueError where a schedule (levels,) holds no step, as schedulers leave it at denoise 0; purpose: a verb."""
    if sigmas.numel() < 2:
        raise ValueError(
            f"sigmas: the schedule has no steps, so there is nothing to {purpose}; raise denoise above 0 on the node "
            "that makes the sigmas, or give it more steps"
        )


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
