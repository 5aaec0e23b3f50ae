"""Core's parts of a sampling run: samplers, guiders, noise and sigmas."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ...files.errors import UsageError
from ...hosts.headless.guider import Guider
from ...hosts.headless.noise import NoNoise, RandomNoise
from ...hosts.headless.samplers import StandardSampler
from ..api import io
from .declare import core_node
from .sampling import SAMPLER_NAMES, SCHEDULER_NAMES, SEED_MAX, grid


@core_node(
    category="model/sampling/samplers",
    inputs=[io.Combo.Input("sampler_name", SAMPLER_NAMES)],
    outputs=[io.Sampler.Output()],
)
def KSamplerSelect(sampler_name):
    """A sampler by name."""
    return io.NodeOutput(StandardSampler(sampler_name))


@core_node(
    category="model/sampling/samplers",
    inputs=[
        io.Float.Input("eta", default=1.0, min=0.0, max=100.0, step=0.01, round=False, advanced=True),
        io.Float.Input("s_noise", default=1.0, min=0.0, max=100.0, step=0.01, round=False, advanced=True),
    ],
    outputs=[io.Sampler.Output()],
)
def SamplerEulerAncestral(eta, s_noise):
    """Euler steps with fresh noise."""
    return io.NodeOutput(StandardSampler("euler_ancestral", {"eta": eta, "s_noise": s_noise}))


@core_node(
    display_name="Basic Guider",
    category="model/sampling/guiders",
    inputs=[io.Model.Input("model"), io.Conditioning.Input("conditioning")],
    outputs=[io.Guider.Output()],
)
def BasicGuider(model, conditioning):
    """One prompt, no guidance."""
    return io.NodeOutput(Guider(model, conditioning))


@core_node(
    display_name="CFG Guider",
    category="model/sampling/guiders",
    inputs=[
        io.Model.Input("model"),
        io.Conditioning.Input("positive"),
        io.Conditioning.Input("negative"),
        io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01),
    ],
    outputs=[io.Guider.Output()],
)
def CFGGuider(model, positive, negative, cfg):
    """Classifier-free guidance."""
    return io.NodeOutput(Guider(model, positive, negative, cfg))


@core_node(
    node_id="RandomNoise",
    category="model/sampling/noise",
    inputs=[io.Int.Input("noise_seed", default=0, min=0, max=SEED_MAX, control_after_generate=True)],
    outputs=[io.Noise.Output()],
)
def RandomNoiseNode(noise_seed):
    """Noise drawn from a seed."""
    return io.NodeOutput(RandomNoise(noise_seed))


@core_node(
    category="model/sampling/noise",
    outputs=[io.Noise.Output()],
)
def DisableNoise():
    """No noise: the latent brings its own."""
    return io.NodeOutput(NoNoise())


@core_node(
    category="model/sampling/schedulers",
    inputs=[
        io.Model.Input("model"),
        io.Combo.Input("scheduler", SCHEDULER_NAMES),
        io.Int.Input("steps", default=20, min=1, max=10000),
        io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01),
    ],
    outputs=[io.Sigmas.Output()],
)
def BasicScheduler(model, scheduler, steps, denoise):
    """The levels of a grid by name."""
    return io.NodeOutput(grid(model, scheduler, steps, denoise))


@core_node(
    category="model/sampling/schedulers",
    inputs=[
        io.Model.Input("model"),
        io.Int.Input("steps", default=1, min=1, max=10),
        io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01),
    ],
    outputs=[io.Sigmas.Output()],
)
def SDTurboScheduler(model, steps, denoise):
    """Timesteps 999, 899, ... from the top."""
    first = 10 - int(10 * denoise)
    timesteps = torch.arange(999, 0, -100)[first : first + steps]
    sigmas = model.schedule.sigma(timesteps)
    return io.NodeOutput(torch.cat([sigmas, sigmas.new_zeros(1)]))


@core_node(
    category="model/sampling/sigmas",
    inputs=[io.Sigmas.Input("sigmas"), io.Int.Input("step", default=0, min=0, max=10000)],
    outputs=[io.Sigmas.Output(display_name=f"{half}_sigmas") for half in ("high", "low")],
)
def SplitSigmas(sigmas: Tensor, step):
    """The levels up to a step, and those from it on."""
    return io.NodeOutput(sigmas[: step + 1], sigmas[step:])


@core_node(
    category="model/sampling/sigmas",
    inputs=[io.Sigmas.Input("sigmas")],
    outputs=[io.Sigmas.Output()],
)
def FlipSigmas(sigmas: Tensor):
    """The levels in reverse, for inversion; a first level of 0 becomes 0.0001."""
    flipped = sigmas.flip(0)
    if len(flipped) and flipped[0] == 0:
        flipped[0] = 0.0001
    return io.NodeOutput(flipped)


@core_node(
    category="model/sampling/sigmas",
    inputs=[io.String.Input("sigmas", default="1, 0.5", multiline=False)],
    outputs=[io.Sigmas.Output()],
    is_experimental=True,
)
def ManualSigmas(sigmas: str):
    """Levels typed by hand."""
    numbers = [float(n) for n in re.findall(r"[-+]?(?:\d+\.?\d*|\.\d+)", sigmas)]
    if not numbers:
        raise UsageError(f"sigmas {sigmas!r} holds no number; type levels from high to low, such as 1, 0.5, 0")
    return io.NodeOutput(torch.tensor(numbers))


NODES = [
    KSamplerSelect,
    SamplerEulerAncestral,
    BasicGuider,
    CFGGuider,
    RandomNoiseNode,
    DisableNoise,
    BasicScheduler,
    SDTurboScheduler,
    SplitSigmas,
    FlipSigmas,
    ManualSigmas,
]
