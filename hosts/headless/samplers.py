"""SAMPLER of the headless host: a method of ours as it is, or ComfyUI's KSAMPLER around a standard sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...sampling.path import NoisePath
from ...sampling.standard import SAMPLERS
from ..methods import Method, Run


@dataclass(frozen=True, eq=False)
class Masked:
    """A model that keeps the latent image where the mask is 0, by noising it to each level; in one row or B."""

    model: Callable[..., Tensor]
    path: NoisePath
    latent: Tensor
    noise: Tensor
    mask: Tensor

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        """x0 of the masked area, the latent image elsewhere."""
        keep, latent = 1.0 - self.mask, self.latent.expand(x.shape)
        x = x * self.mask + self.path.add_noise(latent, sigma, self.noise) * keep
        return self.model(x, sigma, **extra_args) * self.mask + latent * keep


@dataclass(frozen=True)
class StandardSampler(Method):
    """One of `sampling.standard.SAMPLERS` by name, with its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def sample(self, run: Run) -> Tensor:
        """See Method."""
        model = run.model
        if self.name == "ddim" and isinstance(model, Masked):
            # ComfyUI's ddim keeps masked areas with noise of its own.
            seed = run.extra_args["seed"]
            generator = torch.manual_seed((41 if seed is None else seed) + 1)
            model = replace(model, noise=torch.randn(run.noise.shape, generator=generator).to(run.noise))
        x = SAMPLERS[self.name](
            model,
            run.first(run.noise),
            run.sigmas,
            extra_args=run.extra_args,
            callback=run.callback,
            disable=True,
            path=run.path,
            **self.options,
        )
        return run.finished(x)
