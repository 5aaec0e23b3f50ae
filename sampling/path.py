"""The coordinate systems that diffusion models come in, as one small immutable object.

VE (ComfyUI's view of eps, v and EDM models), FLOW (rectified flow: SD3, Flux, Wan, ...) and VP (ComfyUI's
V_PREDICTION_DDPM: CogVideoX). `sigma` is always ComfyUI's number for a level: sqrt((1 - abar) / abar) for VE and VP,
the interpolation time in (0, 1] for FLOW.

    VE    x = x0 + sigma n                        Karras et al. 2022 (arXiv 2206.00364), section 2
    FLOW  x = (1 - sigma) x0 + sigma s n          Liu et al. 2022 (arXiv 2209.03003), eq. 1; s = noise_scale
    VP    x = (x0 + sigma n) / sqrt(1 + sigma^2)  Ho et al. 2020 (arXiv 2006.11239), eq. 4; abar = 1 / (1 + sigma^2)

A rectified flow z = (1 - t) x0 + t n may be carried as VE, and Cosmos Predict2's is (ComfyUI's COSMOS_RFLOW): with
sigma = t / (1 - t), z / (1 - t) is x0 + sigma n. The network is shown z = x / (1 + sigma) and told t = sigma / (1 +
sigma), and its velocity v = n - x0 gives x0 = z - t v = (x - sigma v) / (1 + sigma). `rectified` says so of a VE path.
Level t = 1, noise alone, lies at infinity, so such a model begins at sigma n, as it does in ComfyUI.

Everywhere: latents are (B, C, H, W) or (B, C, T, H, W); sigma is a float, a 0-d tensor or a (B,) tensor, one level per
item of the batch. Where core ComfyUI has the same formula, the operations are taken in its order, so that results agree
bit for bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["VE", "FLOW", "VP"]
KINDS: tuple[str, ...] = get_args(Kind)


def broadcast(values: Tensor, like: Tensor) -> Tensor:
    """(B,) values shaped to multiply a (B, ...) tensor."""
    return values.view(-1, *(1,) * (like.ndim - 1))


def vp_scale(sigma: Tensor) -> Tensor:
    """sqrt(1 + sigma^2), by which a VP latent is multiplied to be VE's."""
    return torch.sqrt(1.0 + sigma**2.0)


def time_of(sigma: Tensor) -> Tensor:
    """The time t in (0, 1) of a rectified flow that is carried as VE at level sigma, of any shape."""
    return sigma / (sigma + 1)


def level_of(time: Tensor) -> Tensor:
    """The level sigma at which such a flow has time t in (0, 1); the inverse of `time_of`."""
    return time / (1 - time)


def _level(sigma: Tensor | float, x: Tensor) -> Tensor:
    """sigma as a tensor that broadcasts over x; a float takes x's dtype so that it rounds as a tensor would."""
    if not isinstance(sigma, Tensor):
        return torch.tensor(sigma, dtype=x.dtype)
    if sigma.ndim == 0:
        return sigma
    if sigma.ndim == 1 and sigma.shape[0] in (1, x.shape[0]):
        return broadcast(sigma, x)
    raise ValueError(
        f"sigma has shape {tuple(sigma.shape)} for a latent of shape {tuple(x.shape)}: "
        f"give a number or one level per item, shape ({x.shape[0]},)"
    )


@dataclass(frozen=True)
class NoisePath:
    """How a clean latent, unit noise and a level make the latent that a model's sampler carries.

    kind: "VE", "FLOW" or "VP". noise_scale: FLOW only, the standard deviation of the model's noise. sigma_data: VE
    only, that of the clean latents, by which the network's input is scaled (Playground 2.5: 0.5). Both are members of
    ComfyUI's `model_sampling`. rectified: VE only, whether the network is a rectified flow's, see the module. Raises
    ValueError for anything else.
    """

    kind: Kind
    noise_scale: float = 1.0
    sigma_data: float = 1.0
    rectified: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"noise path: kind {self.kind!r} is not known; use one of {', '.join(KINDS)}")
        for name, value, owner in (("noise_scale", self.noise_scale, "FLOW"), ("sigma_data", self.sigma_data, "VE")):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"noise path: {name} must be a positive number, got {value!r}")
            if self.kind != owner and value != 1.0:
                raise ValueError(
                    f"noise path: {name} {value} only has a meaning for {owner}, and kind is {self.kind}; "
                    "leave it at 1.0"
                )
        if self.rectified and (self.kind != "VE" or self.sigma_data != 1.0):
            raise ValueError(
                f"noise path: a rectified flow is carried as VE with sigma_data 1, and kind is {self.kind}, sigma_data "
                f"{self.sigma_data}; leave rectified at False"
            )

    @property
    def flow(self) -> bool:
        """Whether the model is a flow, which knows its levels as times in (0, 1]."""
        return self.kind == "FLOW" or self.rectified

    def add_noise(self, x0: Tensor, sigma: Tensor | float, noise: Tensor) -> Tensor:
        """The latent at level sigma made of the clean latent x0 and unit noise (all of x0's shape)."""
        s = _level(sigma, x0)
        if self.kind == "VE":
            return noise * s + x0
        if self.kind == "FLOW":
            return s * self._scaled(noise) + (1.0 - s) * x0
        return (x0 + s * noise) / vp_scale(s)

    def unit_start(self, sigma: Tensor | float, noise: Tensor) -> Tensor:
        """The latent whose network input at level sigma is the unit noise itself (times noise_scale on FLOW).

        A one-step student is fed pure noise at a level below the top (t = 399, say). ComfyUI divides a VE latent by
        sqrt(sigma_data^2 + sigma^2) on the way into the network, so the latent is multiplied by it here; on the other
        two paths the network sees the latent as it is. A rectified flow that is carried as VE begins at sigma n.
        """
        if self.kind == "FLOW":
            return self._scaled(noise)
        return noise * _level(sigma, noise) if self.rectified else self.unit_input(sigma, noise)

    def unit_input(self, sigma: Tensor | float, latent: Tensor) -> Tensor:
        """The latent whose network input at level sigma is `latent` as it stands (InstaRevive feeds a clean one)."""
        return latent * self.shrinking(_level(sigma, latent)) if self.kind == "VE" else latent

    def shrinking(self, sigma: Tensor) -> Tensor:
        """What a VE latent at level sigma, of any shape, is divided by on its way into the network."""
        return 1.0 + sigma if self.rectified else torch.sqrt(self.sigma_data**2 + sigma**2.0)

    def noise_from(self, x: Tensor, x0: Tensor, sigma: Tensor | float) -> Tensor:
        """The unit noise that x at level sigma > 0 contains when its clean latent is x0; the inverse of add_noise."""
        s = _level(sigma, x)
        if self.kind == "VE":
            return (x - x0) / s
        if self.kind == "FLOW":
            return (x - (1.0 - s) * x0) / (s * self.noise_scale)
        return (x * vp_scale(s) - x0) / s

    def move(self, x: Tensor, x0: Tensor, sigma: Tensor | float, sigma_next: Tensor | float) -> Tensor:
        """x carried from level sigma > 0 to sigma_next with its predicted noise kept (DDIM with eta 0, flow Euler)."""
        s, s_next = _level(sigma, x), _level(sigma_next, x)
        if self.kind == "VP":
            return self.add_noise(x0, sigma_next, self.noise_from(x, x0, sigma))
        # (x - x0) / s is dx/ds on VE and on FLOW alike, whatever noise_scale is, since x0 is subtracted whole.
        d = (x - x0) / s
        return x + d * (s_next - s)

    def _scaled(self, noise: Tensor) -> Tensor:
        return noise if self.noise_scale == 1.0 else self.noise_scale * noise


VE = NoisePath("VE")
RECTIFIED = NoisePath("VE", rectified=True)
FLOW = NoisePath("FLOW")
VP = NoisePath("VP")
