"""Samples with the structure of a reference: its coarse part replaces the sample's after each guided step.

Choi et al. 2021, ILVR (arXiv 2108.02938), algorithm 1: x <- x - phi(x) + phi(x'), where phi keeps what survives a
reduction by a factor and x' is the reference, noised to the same level. Hu et al. 2023, "Phasic Content Fusing
Diffusion Model with Directional Distribution Consistency" (arXiv 2309.03729), ICSG: x' is what the model itself makes
of the noised reference, so that the structure arrives in the model's own style; repeated, more of the style. No
iteration is ILVR.

phi is the mean over blocks, copied back over them: an orthogonal projector, so that guiding leaves 1 - phi untouched,
and guiding a step to level zero without iterations gives phi(reference) to the last bit but rounding. The cubic filters
of the papers are no projectors. ICSG's code takes one reverse step of a thousand from the noised reference, and so
compares latents that are one level of a thousand apart; here the prediction is noised to the sample's very level. With
deterministic steps the reference is noised with the run's own noise, with ancestral ones with fresh noise, as theirs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import trange

from .path import NoisePath
from .standard import FiniteWatch, NoiseSampler, default_noise_sampler
from .transition import Transition


@dataclass(frozen=True)
class StructureConfig:
    """How coarse the structure is, and where it is taken from the reference.

    factor: side of the blocks in latent cells; 1 is the whole latent. iterations: how often the model redraws the
    noised reference (a call each at each guided step); 0 is ILVR. first, last: levels between which steps are guided,
    by the level that they end at, both included. steps: "ode" (euler) or "ancestral". Raises ValueError naming the
    field.
    """

    factor: int = 8
    iterations: int = 0
    first: float = math.inf
    last: float = 0.0
    steps: str = "ode"

    def __post_init__(self) -> None:
        if not 1 <= self.factor <= 1024:
            raise ValueError(f"factor must be 1 to 1024, got {self.factor!r}: 8 is the papers', on pixels")
        if not 0 <= self.iterations <= 16:
            raise ValueError(f"iterations must be 0 (ILVR) to 16, got {self.iterations!r}")
        if not 0 <= self.last <= self.first:
            raise ValueError(
                f"the guided range ends at level {self.last:g}, above its start {self.first:g}: let start_percent be "
                "below end_percent"
            )
        if self.steps not in ("ode", "ancestral"):
            raise ValueError(f"steps {self.steps!r} are not known; use 'ode' or 'ancestral'")


def coarse(x: Tensor, factor: int) -> Tensor:
    """phi: the mean over blocks of factor x factor cells of x (B, C, H, W) or, frame by frame, (B, C, T, H, W).

    Blocks at the lower and right edge are smaller where the sides are no multiples. The same shape.
    """
    if factor == 1:
        return x
    frames = x.reshape(-1, 1, *x.shape[-2:])
    # Edge blocks are means over the cells that they have: ceil_mode counts no cell outside.
    means = torch.nn.functional.avg_pool2d(frames, factor, ceil_mode=True, count_include_pad=False)
    copied = means.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    return copied[..., : x.shape[-2], : x.shape[-1]].reshape(x.shape)


def check_reference(reference: Tensor, shape: tuple[int, ...]) -> None:
    """ValueError where a reference (B or 1, C, ...) cannot lie under latents of a shape (B, C, ...)."""
    if len(shape) not in (4, 5):
        raise ValueError("structure guidance needs latents of images or video, and these are several packed into one")
    if tuple(reference.shape[1:]) != tuple(shape[1:]) or reference.shape[0] not in (1, shape[0]):
        raise ValueError(
            f"the reference latent has shape {tuple(reference.shape)} and what is sampled {tuple(shape)}: encode the "
            "reference with the VAE of this model, at the size that is sampled, one picture or as many as the batch has"
        )


@torch.no_grad()
def sample_structure(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    *,
    path: NoisePath,
    config: StructureConfig,
    reference: Tensor,
    noise: Tensor,
    mask: Tensor | None = None,
    noise_sampler: NoiseSampler | None = None,
):
    """The latent at sigmas[-1], guided; see `standard` for arguments, shapes and errors.

    reference: clean, (B, ...) or (1, ...), in the model's scale. noise: the run's unit noise, of x's shape. mask: of
    x's shape, 1 where the latent may change; elsewhere nothing is guided. A step to level zero is guided by the
    reference itself. Calls: one a step, and `iterations` more at each guided level above zero.
    """
    check_reference(reference, tuple(x.shape))
    extra_args = {} if extra_args is None else extra_args
    if noise_sampler is None:
        noise_sampler = default_noise_sampler(x, extra_args.get("seed"))
    s_in = x.new_ones([x.shape[0]])
    reference = reference.to(x).expand_as(x)
    transition = Transition("ode" if config.steps == "ode" else "ancestral")
    watch, levels, numbers = FiniteWatch(x, sigmas), sigmas.unbind(), sigmas.tolist()
    for i in trange(len(levels) - 1, disable=disable):
        sigma, sigma_next = levels[i], levels[i + 1]
        denoised = model(x, sigma * s_in, **extra_args)
        watch.saw(i, denoised)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        fresh = noise_sampler(sigma, sigma_next) if transition.stochastic and numbers[i + 1] > 0 else noise
        x = transition.step(path, x, denoised, sigma * s_in, sigma_next * s_in, fresh)
        if not config.last <= numbers[i + 1] <= config.first:
            continue
        target = reference
        if numbers[i + 1] > 0:
            for _ in range(config.iterations):
                own = noise_sampler(sigma, sigma_next) if transition.stochastic else noise
                target = model(path.add_noise(target, sigma_next, own), sigma_next * s_in, **extra_args)
                watch.saw(i, target)
            own = noise_sampler(sigma, sigma_next) if transition.stochastic else noise
            target = path.add_noise(target, sigma_next, own)
        change = coarse(target - x, config.factor)
        x = x + (change if mask is None else mask * change)
    return watch.checked(x)
