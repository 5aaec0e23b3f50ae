"""The SAMPLER of few-step students: it scales its own start, which KSAMPLER would hand over already scaled."""

from __future__ import annotations

import torch
from comfy.samplers import KSamplerX0Inpaint, Sampler

from ...sampling import presets
from ...sampling.distilled import Mode, Start, sample_distilled, start
from .coordinates import path_of


class DistilledSampler(Sampler):
    """Re-noise, deterministic or single-call sampling with the start that the student was trained on.

    preset: tells the level that the student starts from; a grid that begins below it, or below the model's own highest
    level where there is no preset, means image to image.
    """

    def __init__(self, mode: Mode, start: Start, preset: presets.Preset | None = None):
        self.mode = mode
        self.start = start
        self.preset = preset

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        """What a guider calls. Latents: (B, C, H, W), (B, C, T, H, W), or several packed into one by core."""
        model_sampling = model_wrap.inner_model.model_sampling
        path = path_of(model_sampling)
        model = (KeepInVP if path.kind == "VP" else KSamplerX0Inpaint)(model_wrap, sigmas)
        model.latent_image, model.noise = latent_image, noise

        top = self.max_denoise(model_wrap, sigmas)
        x = start(path, sigmas[0], noise, latent_image, self.start, top, self._own_start(model_sampling, path))
        steps = len(sigmas) - 1

        def report(state):
            callback(state["i"], state["denoised"], state["x"], steps)

        x = sample_distilled(
            model,
            x,
            sigmas,
            {**extra_args, "denoise_mask": denoise_mask},
            report if callback else None,
            disable_pbar,
            path=path,
            mode=self.mode,
        )
        if path.kind == "VP":
            # A LATENT that still holds noise is x0 + sigma n to ComfyUI; core's method for this class leaves x alone.
            x = x * vp_scale(sigmas[-1], x.ndim)
        return model_sampling.inverse_noise_scaling(sigmas[-1], x)

    def _own_start(self, model_sampling, path) -> float | None:
        return None if self.preset is None else presets.start_level(self.preset, model_sampling, path)


class KeepInVP(KSamplerX0Inpaint):
    """Masked sampling in VP coordinates: core keeps an area as x0 + sigma n, a scale that the network never saw."""

    def __call__(self, x, sigma, denoise_mask, model_options, seed=None):
        """x0 of the masked area, the latent image elsewhere."""
        if denoise_mask is None:
            return self.inner_model(x, sigma, model_options=model_options, seed=seed)
        if "denoise_mask_function" in model_options:
            extra = {"model": self.inner_model, "sigmas": self.sigmas}
            denoise_mask = model_options["denoise_mask_function"](sigma, denoise_mask, extra_options=extra)
        kept = self.inner_model.inner_model.scale_latent_inpaint(
            x=x, sigma=sigma, noise=self.noise, latent_image=self.latent_image, denoise_mask=denoise_mask
        )
        x = x * denoise_mask + kept / vp_scale(sigma, x.ndim) * (1 - denoise_mask)
        out = self.inner_model(x, sigma, model_options=model_options, seed=seed)
        return out * denoise_mask + self.latent_image * (1 - denoise_mask)


def vp_scale(sigma: torch.Tensor, ndim: int) -> torch.Tensor:
    """sqrt(1 + sigma^2), by which ComfyUI's x0 + sigma n is larger than a VP latent; shaped for ndim dimensions."""
    return (1 + sigma**2).sqrt().reshape(sigma.shape + (1,) * (ndim - sigma.ndim))
