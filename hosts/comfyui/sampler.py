"""The SAMPLER of ours in ComfyUI: a method, which gets the run of whichever guider samples with it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from comfy.samplers import CFGGuider, Sampler

from ..methods import Method, Run, check_lowest, later, reporter, sampled
from . import lending, work
from .coordinates import path_of
from .labels import relabelled
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
        standing: list[Any] = []  # where the networks are that stand beside this one

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
            many = run.batch if self.method.searches else 1
            return beside(
                self._copies, model_wrap, path, sigmas, extra_args, *rows, guiders, job, many, standing,
            )  # fmt: skip

        def labelled(scale):
            options = relabelled(extra_args["model_options"], scale, path)
            return lambda x, sigma, **extra: run.model(x, sigma, **{**extra, "model_options": options})

        def relay(guider, x, sigma, job, label_scale=1.0):
            lending.check(model_wrap, guider, "second")
            # The two may share a network: what conditions have written into it goes with the first.
            model_wrap.model_patcher.clean_hooks()
            outer = lending.Outer(model_wrap, path, sigmas, extra_args, *rows)
            between = network.process_latent_out(run.carried(x, sigma).float())

            def lent(second, extra):
                latent = second.inner_model.process_latent_in(between)
                there = path.add_noise(latent, sigma, torch.zeros_like(latent))
                return job(lending.Lent(outer, second, extra, label_scale), there)

            # A copy, since the same guider may be first too, and a guider holds its run's state.
            return outer.within(copy.copy(guider), lent)

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
            labelled=labelled,
            relay=relay,
            again=lambda: None,
            callback=reporter(callback, steps),
            disable=disable_pbar,
        )
        if self.method.searches:
            run = as_prior(run, model_wrap, extra_args["model_options"], standing)
        return sampled(self.method, run).to(noise.device)


class FirstOfTwo(CFGGuider):
    """Core's guider around the first of two networks, each of which is for a part of the levels."""

    def __init__(self, model_patcher: Any, lowest: float):
        super().__init__(model_patcher)
        self.lowest = lowest

    def sample(self, noise, latent_image, sampler, sigmas, *given, **named):
        """As core's. ValueError where another network would be needed and the SAMPLER has none."""
        check_lowest(self.lowest, sigmas, sampler.method if isinstance(sampler, MethodSampler) else None)
        return super().sample(noise, latent_image, sampler, sigmas, *given, **named)
