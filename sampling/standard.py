"""Standard samplers: euler (= ddim), euler_ancestral, heun, dpmpp_2m and lcm, for the headless host and for teachers.

Karras et al. 2022 (arXiv 2206.00364), algorithm 2 without churn: euler and heun. Song et al. 2020 (arXiv 2010.02502),
eq. 12: ddim, which on VE and FLOW is euler. Lu et al. 2022 (arXiv 2211.01095), algorithm 2: dpmpp_2m. Luo et al. 2023
(arXiv 2310.04378), algorithm 3: lcm. Given the same noise they agree with ComfyUI's samplers of the same names bit for
bit on VE and FLOW; core has no such samplers on VP, where these run in VE coordinates.

Contract of all: `sample_name(model, x, sigmas, extra_args=None, callback=None, disable=None, *, path, options...)`.
model(x, sigma, **extra_args) -> x0 with x (B, C, H, W) or (B, C, T, H, W), sigma (B,) and guidance inside;
x the noisy latent at sigmas[0]; sigmas 1-D and descending; callback gets k-diffusion's dict
{x, i, sigma, sigma_hat, denoised}; disable silences the progress bar. They return the latent at sigmas[-1] and raise
`SamplingDiverged` when it is not finite.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from .path import VE, NoisePath, broadcast, vp_scale

Model = Callable[..., Tensor]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[dict[str, Any]], None]


class SamplingDiverged(ValueError):
    """The sampled latent holds NaN or infinity; the message names the first step at fault and what to do."""


class FiniteWatch:
    """Remembers, without waiting for the device, whether each call of the model came back finite.

    `saw(step, denoised)` after every call, `checked(x)` once at the end: it returns x, or raises SamplingDiverged.
    """

    def __init__(self, x: Tensor, sigmas: Tensor):
        self._start, self._sigmas = x, sigmas
        self._seen: list[tuple[int, str, Tensor, Tensor]] = []

    def saw(self, step: int, denoised: Tensor, who: str = "the model") -> None:
        # Both ends carry a NaN on, and neither overflows where a sum would; one kernel, and no wait for its result.
        self._seen.append((step, who, *torch.aminmax(denoised)))

    def checked(self, x: Tensor) -> Tensor:
        if bool(torch.isfinite(x).all()):
            return x
        steps = len(self._sigmas) - 1
        if not bool(torch.isfinite(self._start).all()):
            raise SamplingDiverged(
                f"the latent that entered step 1 of {steps} (sigma {float(self._sigmas[0]):.5g}) already holds NaN or "
                "infinity; check the nodes that made the latent image and the noise"
            )
        for step, who, low, high in self._seen:
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise SamplingDiverged(
                    f"{who} returned NaN or infinity in step {step + 1} of {steps} "
                    f"(sigma {float(self._sigmas[step]):.5g}); run it in bf16 or fp32 instead of fp16, and check that "
                    "the LoRA belongs to this model and that its strength and the cfg are not too high"
                )
        raise SamplingDiverged(
            f"the latent left its number format somewhere in the {steps} steps from sigma "
            f"{float(self._sigmas[0]):.5g}, although the model's answers were finite; check that the sigmas belong to "
            "this model and descend"
        )


def default_noise_sampler(x: Tensor, seed: int | None = None) -> NoiseSampler:
    """Fresh unit noise of x's shape, dtype and device at each call; the stream that core's samplers draw.

    seed None takes torch's global generator. On the CPU the stream starts at seed + 1, since the start noise was
    drawn from seed there and the first draw would repeat it.
    """
    generator = None
    if seed is not None:
        generator = torch.Generator(device=x.device)
        generator.manual_seed(seed + 1 if x.device.type == "cpu" else seed)

    def draw(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return torch.randn(x.shape, dtype=x.dtype, layout=x.layout, device=x.device, generator=generator)

    return draw


def on_ve_latents(model: Model) -> Model:
    """A VP model that takes VE latents."""

    def ve_model(y, sigma, **kwargs):
        return model(y / broadcast(vp_scale(sigma), y), sigma, **kwargs)

    return ve_model


def in_ve_on_vp(sampler):
    """Runs a VE sampler on the VP path: y = sqrt(1 + sigma^2) x is VE's latent, so its exact solution is VP's too."""

    @functools.wraps(sampler)
    def run(model, x, sigmas, extra_args=None, callback=None, disable=None, *, path: NoisePath = VE, **options):
        if path.kind != "VP" or len(sigmas) < 2:
            return sampler(model, x, sigmas, extra_args, callback, disable, path=path, **options)

        def ve_callback(info):
            callback({**info, "x": info["x"] / vp_scale(info["sigma"])})

        y = x * vp_scale(sigmas[0])
        y = sampler(
            on_ve_latents(model), y, sigmas, extra_args, ve_callback if callback is not None else None, disable,
            path=VE, **options,
        )  # fmt: skip
        return y / vp_scale(sigmas[-1])

    return run


@torch.no_grad()
@in_ve_on_vp
def sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None, *, path: NoisePath = VE):
    """First-order steps along the probability-flow ODE; DDIM with eta 0. See the module for arguments and errors."""
    extra_args = {} if extra_args is None else extra_args
    s_in = x.new_ones([x.shape[0]])
    watch, levels = FiniteWatch(x, sigmas), sigmas.unbind()
    for i in trange(len(levels) - 1, disable=disable):
        sigma = levels[i]
        denoised = model(x, sigma * s_in, **extra_args)
        watch.saw(i, denoised)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        x = path.move(x, denoised, sigma, levels[i + 1])
    return watch.checked(x)


@torch.no_grad()
@in_ve_on_vp
def sample_heun(model, x, sigmas, extra_args=None, callback=None, disable=None, *, path: NoisePath = VE):
    """Second-order steps (two calls each, but for a last step to zero). See the module for arguments and errors."""
    extra_args = {} if extra_args is None else extra_args
    s_in = x.new_ones([x.shape[0]])
    watch, levels, numbers = FiniteWatch(x, sigmas), sigmas.unbind(), sigmas.tolist()
    for i in trange(len(levels) - 1, disable=disable):
        sigma, sigma_next = levels[i], levels[i + 1]
        denoised = model(x, sigma * s_in, **extra_args)
        watch.saw(i, denoised)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})

        def ahead(y, i=i, sigma_next=sigma_next):
            found = model(y, sigma_next * s_in, **extra_args)
            watch.saw(i, found)
            return found

        x = heun_step(x, denoised, sigma, sigma_next, None if numbers[i + 1] == 0 else ahead)
    return watch.checked(x)


def heun_step(
    x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, ahead: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """One step of heun in VE or FLOW. ahead: latent at sigma_next -> x0 there; None where that level is zero."""
    d = (x - denoised) / sigma
    dt = sigma_next - sigma
    if ahead is None:
        return x + d * dt
    there = x + d * dt
    d_ahead = (there - ahead(there)) / sigma_next
    return x + (d + d_ahead) / 2 * dt


@torch.no_grad()
@in_ve_on_vp
def sample_dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None, *, path: NoisePath = VE):
    """DPM-Solver++(2M): second order from one call a step, by extrapolating x0 linearly in -log sigma.

    dx/dsigma = (x - x0) / sigma on VE and FLOW alike, so one form serves both. See the module for arguments and errors.
    """
    extra_args = {} if extra_args is None else extra_args
    s_in = x.new_ones([x.shape[0]])
    watch, levels, numbers = FiniteWatch(x, sigmas), sigmas.unbind(), sigmas.tolist()
    previous = None
    for i in trange(len(levels) - 1, disable=disable):
        sigma, sigma_next = levels[i], levels[i + 1]
        denoised = model(x, sigma * s_in, **extra_args)
        watch.saw(i, denoised)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        last = None if previous is None or numbers[i + 1] == 0 else (previous, levels[i - 1])
        x = dpmpp_2m_step(x, denoised, sigma, sigma_next, last)
        previous = denoised
    return watch.checked(x)


def dpmpp_2m_step(
    x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, last: tuple[Tensor, Tensor] | None
) -> Tensor:
    """One step of DPM-Solver++(2M) in VE or FLOW. last: the x0 of the step before and its level; None: first order."""
    t, t_next = sigma.log().neg(), sigma_next.log().neg()
    h = t_next - t
    target = denoised
    if last is not None:
        previous, sigma_previous = last
        r = (t - sigma_previous.log().neg()) / h
        target = (1 + 1 / (2 * r)) * denoised - (1 / (2 * r)) * previous
    # Through t, not sigma_next / sigma: core's rounding.
    return (t_next.neg().exp() / t.neg().exp()) * x - (-h).expm1() * target


@torch.no_grad()
@in_ve_on_vp
def sample_euler_ancestral(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    *,
    path: NoisePath = VE,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
):
    """Euler steps to below the next level and fresh noise up to it. See the module for arguments and errors.

    eta: how much of the noise is fresh (0 = euler). s_noise: multiplies the fresh noise. On FLOW the step down leaves
    the latent's clean part too large, so it is rescaled before the noise is added (core's rectified-flow form).
    """
    extra_args = {} if extra_args is None else extra_args
    if noise_sampler is None:
        noise_sampler = default_noise_sampler(x, extra_args.get("seed"))
    s_in = x.new_ones([x.shape[0]])
    watch, levels, numbers = FiniteWatch(x, sigmas), sigmas.unbind(), sigmas.tolist()
    flow = path.kind == "FLOW"
    if flow:
        s_noise = s_noise * path.noise_scale
        down, keep, up = flow_ancestral_levels(sigmas[:-1], sigmas[1:], eta)
    else:
        down, up = ancestral_levels(sigmas[:-1], sigmas[1:], eta)
        ends = (down == 0).tolist()
    for i in trange(len(levels) - 1, disable=disable):
        sigma, sigma_next = levels[i], levels[i + 1]
        denoised = model(x, sigma * s_in, **extra_args)
        watch.saw(i, denoised)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        if flow and numbers[i + 1] != 0:
            fresh = noise_sampler(sigma, sigma_next) * s_noise if eta > 0 else None
            x = ancestral_step(x, denoised, sigma, down[i], up[i], fresh, keep[i])
        elif flow or ends[i]:
            x = denoised
        else:
            x = ancestral_step(x, denoised, sigma, down[i], up[i], noise_sampler(sigma, sigma_next) * s_noise)
    return watch.checked(x)


def ancestral_step(
    x: Tensor, denoised: Tensor, sigma: Tensor, down: Tensor, up: Tensor, noise: Tensor | None,
    keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """An Euler step from level sigma to `down`, and noise (None: none) of deviation `up` on top.

    keep: FLOW only, the factor that restores the clean part; None on VE. Levels: 0-d, or of a shape that broadcasts.
    """
    if keep is None:
        d = (x - denoised) / sigma
        x = x + d * (down - sigma)
    else:
        ratio = down / sigma
        x = ratio * x + (1 - ratio) * denoised
    if noise is None:
        return x
    return (x if keep is None else keep * x) + noise * up


def ancestral_levels(here: Tensor, there: Tensor, eta: float = 1.0) -> tuple[Tensor, Tensor]:
    """(sigma_down, sigma_up) of steps from level to level, sigma_down^2 + sigma_up^2 = there^2."""
    if not eta:
        return there, torch.zeros_like(there)
    up = torch.minimum(there, eta * (there**2 * (here**2 - there**2) / here**2) ** 0.5)
    return (there**2 - up**2) ** 0.5, up


def flow_ancestral_levels(here: Tensor, there: Tensor, eta: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(sigma_down, factor that restores the clean part, standard deviation of the fresh noise) of steps of a flow."""
    down = there * (1 + (there / here - 1) * eta)
    return down, *flow_noise(down, there)


def flow_noise(down: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """(factor of the latent, standard deviation of fresh noise) that lead from level `down` up to `there` in a flow."""
    clean, clean_down = 1 - there, 1 - down
    # Where the levels are equal, rounding may leave less than nothing.
    return clean / clean_down, (there**2 - down**2 * clean**2 / clean_down**2).clamp_min(0) ** 0.5


@torch.no_grad()
def sample_lcm(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    *,
    path: NoisePath = VE,
    noise_sampler: NoiseSampler | None = None,
):
    """The model's clean latent, re-noised to the next level each step. See the module for arguments and errors."""
    extra_args = {} if extra_args is None else extra_args
    if noise_sampler is None:
        noise_sampler = default_noise_sampler(x, extra_args.get("seed"))
    s_in = x.new_ones([x.shape[0]])
    watch, levels, numbers = FiniteWatch(x, sigmas), sigmas.unbind(), sigmas.tolist()
    for i in trange(len(levels) - 1, disable=disable):
        sigma = levels[i]
        denoised = model(x, sigma * s_in, **extra_args)
        watch.saw(i, denoised)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        x = denoised
        if numbers[i + 1] > 0:
            x = path.add_noise(denoised, levels[i + 1], noise_sampler(sigma, levels[i + 1]))
    return watch.checked(x)


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": sample_euler,
    "euler_ancestral": sample_euler_ancestral,
    "heun": sample_heun,
    "dpmpp_2m": sample_dpmpp_2m,
    "lcm": sample_lcm,
    "ddim": sample_euler,
}
