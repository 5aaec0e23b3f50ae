"""SAMPLERs of ours on the headless host: methods that are lent a whole run, and one that begins another later."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...sampling.teleport import Teleport
from .. import methods
from ..methods import Method, later, stored
from ..prior import first_latent
from . import work
from .samplers import Run, Sampler


@dataclass(frozen=True)
class MethodSampler:
    """A method, from the start that ComfyUI's samplers have."""

    method: Method

    def sample(self, run: Run) -> Tensor:
        """The latent at the last level."""
        x = self.method.sample(
            methods.Run(
                model=run.masked(run.noise),
                x=first_latent(run.path, run.sigmas[0], run.latent, run.max_denoise)(run.noise),
                clean=run.latent,
                sigmas=run.sigmas,
                path=run.path,
                schedule=run.schedule,
                noise=run.noise,
                mask=run.mask,
                latents_in=run.latents_in,
                tell=work.say,
                callback=run.reporter(),
                extra_args={"seed": run.seed},
            )
        )
        return stored(run.path, x, run.sigmas[-1])


@dataclass(frozen=True)
class TeleportSampler:
    """Another SAMPLER, begun at the level and the latent that a Gaussian's flow leads to."""

    inner: Sampler
    plan: Teleport

    def sample(self, run: Run) -> Tensor:
        """The latent at the last level; where nothing can be skipped, the inner sampler's own run."""
        empty = not bool(torch.count_nonzero(run.latent))
        why_not = self.plan.why_not(run.sigmas, run.noise.shape, run.max_denoise, empty, run.mask is not None)
        if why_not:
            work.say(f"Teleport does nothing: {why_not}")
            return self.inner.sample(run)
        start = first_latent(run.path, run.sigmas[0], run.latent, run.max_denoise)(run.noise)
        x = self.plan.jump(run.denoiser, start, run.sigmas, run.path)
        done, steps = self.plan.first(run.sigmas), len(run.sigmas) - 1
        work.say(f"Teleport: {done} of {steps} steps skipped, to sigma {float(run.sigmas[done]):.4g}")
        x = stored(run.path, x, run.sigmas[done])
        if done == steps:
            return x
        # As ComfyUI goes on with a latent that still holds noise: without any more, and with it as the latent image.
        rest = replace(
            run,
            sigmas=run.sigmas[done:],
            noise=torch.zeros_like(x),
            latent=x,
            callback=later(run.callback, done, steps),
        )
        return self.inner.sample(rest)
