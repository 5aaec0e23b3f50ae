"""Masked sampling of the models that core has no sampler for."""

from __future__ import annotations

from comfy.samplers import KSamplerX0Inpaint

from ...sampling.path import broadcast, vp_scale


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
        scale = broadcast(vp_scale(sigma), x)
        x = x * denoise_mask + kept / scale * (1 - denoise_mask)
        out = self.inner_model(x, sigma, model_options=model_options, seed=seed)
        return out * denoise_mask + self.latent_image * (1 - denoise_mask)


def masked(guider, sigmas, path, latent, noise) -> KSamplerX0Inpaint:
    """The guider's model on this path as core's samplers mask it: with this latent image and noise where it is kept."""
    model = (KeepInVP if path.kind == "VP" else KSamplerX0Inpaint)(guider, sigmas)
    model.latent_image, model.noise = latent, noise
    return model
