"""SAMPLERs of ours in ComfyUI: methods that are lent a whole run, and one that begins another SAMPLER later."""

from __future__ import annotations

import torch
from comfy.samplers import KSamplerX0Inpaint, Sampler

from ...sampling.teleport import Teleport
from ..methods import Method, Run, later, stored
from ..prior import first_latent
from . import work
from .coordinates import path_of
from .sampler import KeepInVP


class MethodSampler(Sampler):
    """A method, from the start that core's samplers have."""

    def __init__(self, method: Method):
        self.method = method

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        """What a guider calls. Latents: (B, C, H, W) or (B, C, T, H, W)."""
        network = model_wrap.inner_model
        path = path_of(network.model_sampling)
        model = (KeepInVP if path.kind == "VP" else KSamplerX0Inpaint)(model_wrap, sigmas)
        model.latent_image, model.noise = latent_image, noise
        steps = len(sigmas) - 1

        def report(state):
            callback(state["i"], state["denoised"], state["x"], steps)

        x = self.method.sample(
            Run(
                model=model,
                x=first_latent(path, sigmas[0], latent_image, self.max_denoise(model_wrap, sigmas))(noise),
                clean=latent_image,
                sigmas=sigmas,
                path=path,
                schedule=network.model_sampling,
                noise=noise,
                mask=denoise_mask,
                latents_in=lambda samples: work.process_in(network, samples),
                tell=work.say,
                callback=report if callback else None,
                extra_args={**extra_args, "denoise_mask": denoise_mask},
                disable=disable_pbar,
            )
        )
        return stored(path, x, sigmas[-1])


class TeleportSampler(Sampler):
    """Another SAMPLER, begun at the level and the latent that a Gaussian's flow leads to."""

    def __init__(self, inner: Sampler, plan: Teleport):
        self.inner, self.plan = inner, plan

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        """What a guider calls; where nothing can be skipped, the inner sampler's own run."""
        path = path_of(model_wrap.inner_model.model_sampling)
        top = self.max_denoise(model_wrap, sigmas)
        empty = not bool(torch.count_nonzero(latent_image))
        why_not = self.plan.why_not(sigmas, noise.shape, top, empty, denoise_mask is not None)
        if why_not:
            work.say(f"Teleport does nothing: {why_not}")
            return self.inner.sample(
                model_wrap, sigmas, extra_args, callback, noise, latent_image, denoise_mask, disable_pbar
            )

        def model(x, sigma):
            return model_wrap(x, sigma, model_options=extra_args["model_options"], seed=extra_args["seed"])

        x = self.plan.jump(model, first_latent(path, sigmas[0], latent_image, top)(noise), sigmas, path)
        done, steps = self.plan.first(sigmas), len(sigmas) - 1
        work.say(f"Teleport: {done} of {steps} steps skipped, to sigma {float(sigmas[done]):.4g}")
        x = stored(path, x, sigmas[done])
        if done == steps:
            return x
        # As core goes on with a latent that still holds noise: without any more, and with it as the latent image.
        return self.inner.sample(
            model_wrap, sigmas[done:], extra_args, later(callback, done, steps), torch.zeros_like(x), x, None,
            disable_pbar,
        )  # fmt: skip
