"""The SAMPLER of ours in ComfyUI: a method, which gets the run of whichever guider samples with it."""

from __future__ import annotations

from typing import Any

import torch
from comfy.samplers import Sampler

from ..methods import Method, Run, later, reporter, sampled
from . import work
from .coordinates import path_of
from .masks import masked
from .reflection import beside, keeping
from .search import as_prior


class MethodSampler(Sampler):
    """A method. Networks that reflection has read again are kept for the next run."""

    def __init__(self, method: Method):
        self.method = method
        self._copies: dict[int, Any] = {}

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        """What a guider calls. Latents: (B, C, H, W), (B, C, T, H, W), or several packed into one by core."""
        network = model_wrap.inner_model
        path = path_of(network.model_sampling)
        steps, shape = len(sigmas) - 1, noise.shape
        if self.method.searches:
            # One row for all candidates: the area that is kept has the same noise in each, which is the first one's.
            noise, latent_image = noise[:1], latent_image[:1]
            denoise_mask = None if denoise_mask is None else denoise_mask[:1]

        rows = noise, latent_image, denoise_mask

        def other(sampler, done=0, x=None):
            if x is None:
                return sampler.sample(model_wrap, sigmas, extra_args, callback, *rows, disable_pbar)
            # As core goes on with a latent that still holds noise: without any more, and with it as the latent image.
            x = run.carried(x, sigmas[done])
            return sampler.sample(
                model_wrap, sigmas[done:], extra_args, later(callback, done, steps), torch.zeros_like(x), x, None,
                disable_pbar,
            )  # fmt: skip

        def with_guiders(guiders, job):
            return beside(self._copies, model_wrap, path, sigmas, extra_args, *rows, guiders, job)

        run = Run(
            model=masked(model_wrap, sigmas, path, latent_image, noise),
            path=path,
            sigmas=sigmas,
            shape=tuple(shape[1:]),
            latent=latent_image,
            top=self.max_denoise(model_wrap, sigmas),
            extra_args={**extra_args, "denoise_mask": denoise_mask},
            batch=shape[0],
            noise=noise,
            mask=denoise_mask,
            schedule=network.model_sampling,
            latents_in=lambda samples: work.process_in(network, samples),
            latents_out=lambda x0: network.process_latent_out(x0.float()),
            tell=work.say,
            keep=None if denoise_mask is None else keeping(model_wrap, path, sigmas, extra_args, *rows),
            other=other,
            beside=with_guiders,
            again=lambda: None,
            callback=reporter(callback, steps),
            disable=disable_pbar,
        )
        if self.method.searches:
            run = as_prior(run, model_wrap, extra_args["model_options"])
        return sampled(self.method, run).to(noise.device)
