"""The sampler that samplers of extensions derive from, and its guided denoiser."""

import inspect
from types import SimpleNamespace

import torch

from modules import sd_samplers_common, shared


class Denoiser:
    """(x, sigma, cond_scale, ...) -> x0, told by `step` how far a prompt has changed. Writes its calls down."""

    def __init__(self, sampler, sd_model):
        self.sampler, self.p = sampler, None
        self.inner_model = SimpleNamespace(inner_model=sd_model, predictor=sd_model.predictor)
        self.step, self.total_steps, self.calls = 0, None, []

    def __call__(self, x, sigma, uncond, cond, cond_scale, s_min_uncond, image_cond):
        if shared.state.interrupted:
            raise sd_samplers_common.InterruptedException
        if self.p.is_hr_pass:
            cond_scale = self.p.hr_cfg
        if uncond is None and cond_scale != 1:
            raise AssertionError("there is no negative prompt to be guided away from")
        self.calls.append(SimpleNamespace(x=x.clone(), sigma=sigma.clone(), cfg=cond_scale, step=self.step))
        denoised = self.inner_model.inner_model.guided(x, sigma, cond_scale)
        self.sampler.last_latent = denoised
        self.step += 1
        return denoised


class KDiffusionSampler:
    def __init__(self, funcname, sd_model, options=None):
        self.func, self.config, self.p, self.last_latent = funcname, None, None, None
        self.model_wrap_cfg = Denoiser(self, sd_model)
        self.model_wrap = self.model_wrap_cfg.inner_model
        self.steps_told = []

    def get_sigmas(self, p, steps):
        levels = self.model_wrap.predictor.sigmas
        chosen = torch.linspace(len(levels) - 1, 0, steps).round().long()
        return torch.cat([levels[chosen], torch.zeros(1)])

    def callback_state(self, d):
        self.steps_told.append(d["i"])

    def launch(self, p, x, sigmas, steps, conditioning, unconditional_conditioning, image_conditioning):
        self.p = self.model_wrap_cfg.p = p
        self.model_wrap_cfg.step, self.model_wrap_cfg.total_steps = 0, self.config.total_steps(steps)
        self.last_latent = x
        if "sigmas" not in inspect.signature(self.func).parameters:
            raise AssertionError("the host hands sigmas only to a function with a parameter of that name")
        extra_args = {
            "cond": conditioning,
            "image_cond": image_conditioning,
            "uncond": unconditional_conditioning,
            "cond_scale": p.cfg_scale,
            "s_min_uncond": 0.0,
        }
        try:
            return self.func(
                self.model_wrap_cfg, x, extra_args=extra_args, disable=True, callback=self.callback_state, sigmas=sigmas
            )
        except sd_samplers_common.InterruptedException:
            return self.last_latent

    def sample(self, p, x, conditioning, unconditional_conditioning, steps=None, image_conditioning=None):
        steps = steps or p.steps
        sigmas = self.get_sigmas(p, steps)
        largest = shared.opts.sgm_noise_multiplier
        x = self.model_wrap.predictor.noise_scaling(sigmas[0], x, torch.zeros_like(x), max_denoise=largest)
        return self.launch(p, x, sigmas, steps, conditioning, unconditional_conditioning, image_conditioning)

    def sample_img2img(
        self, p, x, noise, conditioning, unconditional_conditioning, steps=None, image_conditioning=None
    ):
        steps, last = sd_samplers_common.setup_img2img_steps(p, steps)
        sigmas = self.get_sigmas(p, steps)[steps - last - 1 :]
        noised = self.model_wrap.predictor.noise_scaling(sigmas[0], noise, x, max_denoise=False)
        noised = noised + noise * shared.opts.img2img_extra_noise
        return self.launch(p, noised, sigmas, last + 1, conditioning, unconditional_conditioning, image_conditioning)
