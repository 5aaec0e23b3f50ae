"""Core's sampling nodes: KSampler, KSamplerAdvanced, SamplerCustom, SamplerCustomAdvanced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...hosts.headless import progress
from ...hosts.headless.guider import Guider
from ...hosts.headless.model import Model
from ...hosts.headless.noise import NoNoise, RandomNoise
from ...hosts.headless.samplers import StandardSampler
from ...hosts.methods import Method
from ...sampling.grids import GRIDS
from ...sampling.standard import SAMPLERS
from ..api import io
from .declare import core_node

SEED_MAX = 0xFFFFFFFFFFFFFFFF
SAMPLER_NAMES = list(SAMPLERS)
SCHEDULER_NAMES = list(GRIDS)


def sample_latent(
    guider: Guider, noise, sampler: Method, sigmas: Tensor, latent: dict[str, Any], seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(LATENT, LATENT of the last predicted x0) of one sampling run."""
    form = guider.model.latent
    start = {**latent, "samples": form.fitted(latent["samples"])}
    last_x0: list[Tensor] = []

    def report(step: int, x0: Tensor, x: Tensor, steps: int) -> None:
        last_x0[:] = [x0]
        progress.step(step + 1, steps)

    mask = latent.get("noise_mask")
    drawn = noise.generate_noise(start)
    samples = guider.sample(drawn, start["samples"], sampler, sigmas, mask, report, seed)
    kept = {k: v for k, v in start.items() if not k.startswith("downscale_ratio")}
    out = {**kept, "samples": samples}
    return out, {**kept, "samples": form.process_out(last_x0[0].float()).cpu()} if last_x0 else out


def grid(model: Model, scheduler: str, steps: int, denoise: float = 1.0) -> Tensor:
    """The last steps + 1 levels of a grid that would take steps / denoise; none for denoise 0."""
    if denoise <= 0.0:
        return torch.empty(0)
    total = steps if denoise >= 1.0 else int(steps / denoise)
    return GRIDS[scheduler](model.schedule, total)[-(steps + 1) :]


def _seed(id: str):
    return io.Int.Input(id, default=0, min=0, max=SEED_MAX, control_after_generate=True, tooltip="Draws the noise.")


def _cfg():
    return io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Guidance; 1 is none.")


def _steps():
    return io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Calls of the model.")


@core_node(
    category="model/sampling",
    inputs=[
        io.Model.Input("model"),
        _seed("seed"),
        _steps(),
        _cfg(),
        io.Combo.Input("sampler_name", SAMPLER_NAMES),
        io.Combo.Input("scheduler", SCHEDULER_NAMES),
        io.Conditioning.Input("positive"),
        io.Conditioning.Input("negative"),
        io.Latent.Input("latent_image"),
        io.Float.Input(
            "denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="Below 1: keep some of the latent."
        ),
    ],
    outputs=[io.Latent.Output()],
)
def KSampler(model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise=1.0):
    """Samples a latent."""
    sigmas = grid(model, scheduler, steps, 1.0 if denoise > 0.9999 else denoise)
    guider = Guider(model, positive, negative, cfg)
    return io.NodeOutput(
        sample_latent(guider, RandomNoise(seed), StandardSampler(sampler_name), sigmas, latent_image, seed)[0]
    )


@core_node(
    display_name="KSampler (Advanced)",
    category="model/sampling",
    inputs=[
        io.Model.Input("model"),
        io.Combo.Input("add_noise", ["enable", "disable"], advanced=True),
        _seed("noise_seed"),
        _steps(),
        _cfg(),
        io.Combo.Input("sampler_name", SAMPLER_NAMES),
        io.Combo.Input("scheduler", SCHEDULER_NAMES),
        io.Conditioning.Input("positive"),
        io.Conditioning.Input("negative"),
        io.Latent.Input("latent_image"),
        io.Int.Input("start_at_step", default=0, min=0, max=10000, advanced=True),
        io.Int.Input("end_at_step", default=10000, min=0, max=10000, advanced=True),
        io.Combo.Input("return_with_leftover_noise", ["disable", "enable"], advanced=True),
    ],
    outputs=[io.Latent.Output()],
)
def KSamplerAdvanced(model,
    add_noise,
    noise_seed,
    steps,
    cfg,
    sampler_name,
    scheduler,
    positive,
    negative,
    latent_image,
    start_at_step,
    end_at_step,
    return_with_leftover_noise,
):
    """Samples part of a grid."""
    sigmas = grid(model, scheduler, steps)
    if end_at_step < len(sigmas) - 1:
        sigmas = sigmas[: end_at_step + 1].clone()
        if return_with_leftover_noise == "disable":
            sigmas[-1] = 0
    # Starting behind the end leaves nothing to do.
    sigmas = sigmas[start_at_step:] if start_at_step < len(sigmas) - 1 else sigmas[:0]
    noise = RandomNoise(noise_seed) if add_noise == "enable" else NoNoise()
    guider, sampler = Guider(model, positive, negative, cfg), StandardSampler(sampler_name)
    return io.NodeOutput(sample_latent(guider, noise, sampler, sigmas, latent_image, noise_seed)[0])


_OUTPUTS = ("output", "denoised_output")


@core_node(
    category="model/sampling/custom",
    inputs=[
        io.Model.Input("model"),
        io.Boolean.Input("add_noise", default=True, advanced=True),
        _seed("noise_seed"),
        _cfg(),
        io.Conditioning.Input("positive"),
        io.Conditioning.Input("negative"),
        io.Sampler.Input("sampler"),
        io.Sigmas.Input("sigmas"),
        io.Latent.Input("latent_image"),
    ],
    outputs=[io.Latent.Output(display_name=name) for name in _OUTPUTS],
)
def SamplerCustom(model, add_noise, noise_seed, cfg, positive, negative, sampler, sigmas, latent_image):
    """Samples a latent with a SAMPLER and SIGMAS of one's own."""
    noise = RandomNoise(noise_seed) if add_noise else NoNoise()
    guider = Guider(model, positive, negative, cfg)
    return io.NodeOutput(*sample_latent(guider, noise, sampler, sigmas, latent_image, noise_seed))


@core_node(
    category="model/sampling/custom",
    inputs=[
        io.Noise.Input("noise"),
        io.Guider.Input("guider"),
        io.Sampler.Input("sampler"),
        io.Sigmas.Input("sigmas"),
        io.Latent.Input("latent_image"),
    ],
    outputs=[io.Latent.Output(display_name=name) for name in _OUTPUTS],
)
def SamplerCustomAdvanced(noise, guider, sampler, sigmas, latent_image):
    """Samples a latent; noise, guider, sampler and sigmas are nodes of their own."""
    return io.NodeOutput(*sample_latent(guider, noise, sampler, sigmas, latent_image, noise.seed))


NODES = [KSampler, KSamplerAdvanced, SamplerCustom, SamplerCustomAdvanced]
