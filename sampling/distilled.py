"""Samples with distilled students: few calls, each at the level and with the input scaling of the training.

renoise: x0, then fresh noise up to the next level - DMD2 (Yin et al. 2024, arXiv 2405.14867, section 4.4), LCM (Luo et
al. 2023, arXiv 2310.04378, algorithm 3), f-distill. deterministic: the predicted noise is kept (DDIM with eta 0, flow
Euler) - TDM (Luo et al. 2025, arXiv 2503.06674), Lightning. single: one call - DMD2 and DI* at t = 399, InstaRevive.
ancestral, tcd: a part of the noise is renewed (see `between`) - SDXL Turbo, LTX-2.5's first stage; TCD, Hyper-SD.
The contract of the sampler is that of `standard`; `start` makes its first latent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .between import SAME_LEVEL, Partly, ancestral, clipped, tcd
from .path import NoisePath
from .schedule import Schedule
from .standard import FiniteWatch, NoiseSampler, default_noise_sampler

Mode = Literal["renoise", "deterministic", "single", "ancestral", "tcd"]
Start = Literal["unit", "noised", "latent"]
MODES: tuple[str, ...] = get_args(Mode)
STARTS: tuple[str, ...] = get_args(Start)


@dataclass(frozen=True)
class Rule:
    """What a student does between its levels. Raises ValueError naming the field when a value makes no sense.

    mode: one of MODES. eta: how much of the noise "ancestral" and "tcd" renew in a step, 0 .. 1. label_scale: the
    network is told the timestep of its level times this (`between.told`). noise_scale: standard deviation of the noise
    that is added, where it is not the model's own. clip: fresh noise is cut off at so many of its own standard
    deviations; None cuts nothing.
    """

    mode: Mode = "renoise"
    eta: float = 1.0
    label_scale: float = 1.0
    noise_scale: float | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} is not known; use one of {', '.join(MODES)}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta!r}; use 0 .. 1, where 1 draws the most noise afresh")
        if not 0 < self.label_scale <= 1:
            raise ValueError(f"label_scale is {self.label_scale!r}; use a number above 0, and at most 1")
        for name, value in (("noise_scale", self.noise_scale), ("clip", self.clip)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value!r}; use a positive number, or leave it out")


    def noised(self, path: NoisePath) -> NoisePath:
        """The model's path with this rule's noise; ValueError where it has a scale and the path has none."""
        return path if self.noise_scale is None else replace(path, noise_scale=self.noise_scale)

    def partly(self, path: NoisePath, schedule: Schedule | None, sigmas: Tensor) -> Partly | None:
        """What renews a part of the noise along sigmas (steps + 1,); None in the other modes."""
        if self.mode == "ancestral":
            return ancestral(path, sigmas, self.eta)
        if self.mode != "tcd":
            return None
        if schedule is None:
            raise ValueError("mode 'tcd' counts in the model's timesteps: give its schedule")
        return tcd(path, schedule, sigmas, self.eta)


def start(
    path: NoisePath,
    sigma: Tensor | float,
    noise: Tensor,
    latent: Tensor | None,
    start: Start = "unit",
    max_denoise: bool = False,
    start_sigma: float | None = None,
) -> Tensor:
    """The first latent of a student, at level sigma (float or 0-d), from unit noise and the latent image.

    start: "unit" - the noise itself is the network's first input, whatever the level; "noised" - the latent image with
    noise at level sigma, as core does it; "latent" - the clean latent image enters the network unscaled.
    max_denoise: sigma is the model's highest level; core then still adds the latent image on VE, and so does "unit",
    to stay equal to it. start_sigma: the level that the student itself starts from, where it is known.

    "unit" becomes "noised" when the latent image is not empty and sigma is below the student's own start
    (image-to-image, the second part of a split grid); without start_sigma, whenever sigma is not the model's highest.
    noise and latent (or None): (B, C, H, W) or (B, C, T, H, W). Raises ValueError for an unknown start, for "latent"
    without a latent and for shapes that differ.
    """
    if start not in STARTS:
        raise ValueError(f"start {start!r} is not known; use one of {', '.join(STARTS)}")
    if latent is not None and latent.shape != noise.shape:
        raise ValueError(
            f"start: the latent image has shape {tuple(latent.shape)} and the noise {tuple(noise.shape)}; "
            "make the noise for this latent"
        )
    if start == "latent":
        if latent is None:
            raise ValueError("start 'latent' feeds the latent image itself to the network: connect one")
        return path.unit_input(sigma, latent)
    if start == "unit" and latent is not None:
        below = not max_denoise if start_sigma is None else float(sigma) < start_sigma * (1 - SAME_LEVEL)
        if below and bool(torch.count_nonzero(latent)):
            start = "noised"
    if start == "noised":
        return path.add_noise(torch.zeros_like(noise) if latent is None else latent, sigma, noise)
    x = path.unit_start(sigma, noise)
    return x + latent if max_denoise and path.kind == "VE" and latent is not None else x


@torch.no_grad()
def sample_distilled(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    *,
    path: NoisePath,
    rule: Rule | None = None,
    schedule: Schedule | None = None,
    noise_sampler: NoiseSampler | None = None,
    steps: range | None = None,
):
    """One call of the model per level; see the module for the modes and `standard` for arguments, shapes and errors.

    path: `rule.noised` of the model's own. model: is told what `rule.label_scale` says by whoever gives it. rule: None
    re-noises. schedule: the model's, which only "tcd" asks for. steps: those of the grid that are made, all by default;
    x is then at the first one's level. A step to level zero returns the model's x0
    itself; in "deterministic" it is rounded as by core's euler. Raises ValueError for "single" on a grid of more than
    one step.
    """
    rule = Rule() if rule is None else rule
    mode = rule.mode
    if mode == "single" and len(sigmas) > 2:
        raise ValueError(
            f"mode 'single' makes one call, and the sigmas ask for {len(sigmas) - 1} steps; "
            "give one step, or choose 'renoise' or 'deterministic'"
        )
    extra_args = {} if extra_args is None else extra_args
    if noise_sampler is None:
        noise_sampler = default_noise_sampler(x, extra_args.get("seed"))
    s_in = x.new_ones([x.shape[0]])
    # Arithmetic on the 0-d tensors, as core does it; decisions on the numbers, which leave the device once.
    watch, levels, numbers = FiniteWatch(x, sigmas), sigmas.unbind(), sigmas.tolist()
    partly = rule.partly(path, schedule, sigmas)
    for i in tqdm(range(len(levels) - 1) if steps is None else steps, disable=disable):
        sigma = levels[i]
        denoised = model(x, sigma * s_in, **extra_args)
        watch.saw(i, denoised)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        if mode == "deterministic":
            # To level zero too, where core's euler ends in the same roundings of x0.
            x = path.move(x, denoised, sigma, levels[i + 1])
        elif mode == "single" or numbers[i + 1] == 0:
            x = denoised
        else:
            fresh = clipped(noise_sampler(sigma, levels[i + 1]), rule.clip)
            if partly is None:
                x = path.add_noise(denoised, levels[i + 1], fresh)
            else:
                x = partly.step(i, x, denoised, sigma, levels[i + 1], fresh)
    return watch.checked(x)
