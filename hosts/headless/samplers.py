"""SAMPLER of the headless host: ComfyUI's KSAMPLER around our own samplers, and the start that students need."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ...sampling import presets
from ...sampling.distilled import Mode, Start, sample_distilled, start
from ...sampling.path import NoisePath
from ...sampling.schedule import Schedule
from ...sampling.standard import SAMPLERS
from .model import LatentFormat


@dataclass(frozen=True, eq=False)
class Run:
    """What a guider hands to a sampler; noise, latent (model space) and mask have one shape, sigmas are 1-D.

    latents_in: LATENT samples in model space.
    """

    denoiser: Callable[..., Tensor]
    sigmas: Tensor
    noise: Tensor
    latent: Tensor
    mask: Tensor | None
    path: NoisePath
    schedule: Schedule
    form: LatentFormat
    seed: int | None
    callback: Callable[[int, Tensor, Tensor, int], None] | None
    latents_in: Callable[[Tensor], Tensor]

    @property
    def max_denoise(self) -> bool:
        """Whether the first level is the model's highest, by ComfyUI's tolerance."""
        first, top = float(self.sigmas[0]), float(self.schedule.sigma_max)
        return first > top or math.isclose(top, first, rel_tol=1e-5)

    def reporter(self) -> Callable[[dict[str, Any]], None] | None:
        """The callback in k-diffusion's form."""
        report, steps = self.callback, len(self.sigmas) - 1
        if report is None:
            return None
        return lambda state: report(state["i"], state["denoised"], state["x"], steps)

    def masked(self, noise: Tensor) -> Callable[..., Tensor]:
        """The denoiser that keeps the latent image where the mask is 0, by noising it to each level."""
        mask = self.mask
        if mask is None:
            return self.denoiser
        keep, kept_image = 1.0 - mask, self.latent * (1.0 - mask)

        def denoise(x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
            x = x * mask + self.path.add_noise(self.latent, sigma, noise) * keep
            return self.denoiser(x, sigma, **extra_args) * mask + kept_image

        return denoise

    def finished(self, x: Tensor) -> Tensor:
        """The latent at the last level as ComfyUI stores it: a flow latent that stops early is unshrunk."""
        return x / (1.0 - self.sigmas[-1]) if self.path.kind == "FLOW" else x


class Sampler(Protocol):
    """SAMPLER: from a run to its latent in model space."""

    def sample(self, run: Run) -> Tensor:
        """The latent at the last level."""
        ...


@dataclass(frozen=True)
class StandardSampler:
    """One of `sampling.standard.SAMPLERS` by name, with its options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def sample(self, run: Run) -> Tensor:
        """The latent at the last level; noise is scaled to the first as ComfyUI does it."""
        kept_noise = run.noise
        if self.name == "ddim" and run.mask is not None:
            # ComfyUI's ddim keeps masked areas with noise of its own.
            generator = torch.manual_seed((41 if run.seed is None else run.seed) + 1)
            kept_noise = torch.randn(run.noise.shape, generator=generator).to(run.noise)
        sigma = run.sigmas[0]
        if run.path.kind == "VE" and run.max_denoise:
            x = run.path.unit_start(sigma, run.noise) + run.latent
        else:
            x = run.path.add_noise(run.latent, sigma, run.noise)
        x = SAMPLERS[self.name](
            run.masked(kept_noise),
            x,
            run.sigmas,
            extra_args={"seed": run.seed},
            callback=run.reporter(),
            disable=True,
            path=run.path,
            **self.options,
        )
        return run.finished(x)


@dataclass(frozen=True)
class DistilledSampler:
    """Few-step sampling with the start that the student was trained on.

    preset: tells the level that the student itself starts from, so that a grid below it means image to image.
    """

    mode: Mode
    start: Start
    preset: presets.Preset | None = None

    def sample(self, run: Run) -> Tensor:
        """The latent at the last level."""
        own = None if self.preset is None else presets.start_level(self.preset, run.schedule, run.path)
        x = start(run.path, run.sigmas[0], run.noise, run.latent, self.start, run.max_denoise, own)
        x = sample_distilled(
            run.masked(run.noise),
            x,
            run.sigmas,
            extra_args={"seed": run.seed},
            callback=run.reporter(),
            disable=True,
            path=run.path,
            mode=self.mode,
        )
        return run.finished(x)
