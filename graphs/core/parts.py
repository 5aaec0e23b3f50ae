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
from .sampling import SAMPLER_NAMES, SCHEDULER_NAMES, SEED_MAX, grid


class KSamplerSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="KSamplerSelect",
            category="model/sampling/samplers",
            description="A sampler by name.",
            inputs=[io.Combo.Input("sampler_name", SAMPLER_NAMES)],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, sampler_name):
        return io.NodeOutput(StandardSampler(sampler_name))


class SamplerEulerAncestral(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SamplerEulerAncestral",
            category="model/sampling/samplers",
            description="Euler steps with fresh noise.",
            inputs=[
                io.Float.Input("eta", default=1.0, min=0.0, max=100.0, step=0.01, round=False, advanced=True),
                io.Float.Input("s_noise", default=1.0, min=0.0, max=100.0, step=0.01, round=False, advanced=True),
            ],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, eta, s_noise):
        return io.NodeOutput(StandardSampler("euler_ancestral", {"eta": eta, "s_noise": s_noise}))


class BasicGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BasicGuider",
            display_name="Basic Guider",
            category="model/sampling/guiders",
            description="One prompt, no guidance.",
            inputs=[io.Model.Input("model"), io.Conditioning.Input("conditioning")],
            outputs=[io.Guider.Output()],
        )

    @classmethod
    def execute(cls, model, conditioning):
        return io.NodeOutput(Guider(model, conditioning))


class CFGGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CFGGuider",
            display_name="CFG Guider",
            category="model/sampling/guiders",
            description="Classifier-free guidance.",
            inputs=[
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01),
            ],
            outputs=[io.Guider.Output()],
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg):
        return io.NodeOutput(Guider(model, positive, negative, cfg))


class RandomNoiseNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RandomNoise",
            category="model/sampling/noise",
            description="Noise drawn from a seed.",
            inputs=[io.Int.Input("noise_seed", default=0, min=0, max=SEED_MAX, control_after_generate=True)],
            outputs=[io.Noise.Output()],
        )

    @classmethod
    def execute(cls, noise_seed):
        return io.NodeOutput(RandomNoise(noise_seed))


class DisableNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DisableNoise",
            category="model/sampling/noise",
            description="No noise: the latent brings its own.",
            outputs=[io.Noise.Output()],
        )

    @classmethod
    def execute(cls):
        return io.NodeOutput(NoNoise())


class BasicScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="BasicScheduler",
            category="model/sampling/schedulers",
            description="The levels of a grid by name.",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("scheduler", SCHEDULER_NAMES),
                io.Int.Input("steps", default=20, min=1, max=10000),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, model, scheduler, steps, denoise):
        return io.NodeOutput(grid(model, scheduler, steps, denoise))


class SDTurboScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SDTurboScheduler",
            category="model/sampling/schedulers",
            description="Timesteps 999, 899, ... from the top.",
            inputs=[
                io.Model.Input("model"),
                io.Int.Input("steps", default=1, min=1, max=10),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, model, steps, denoise):
        first = 10 - int(10 * denoise)
        timesteps = torch.arange(999, 0, -100)[first : first + steps]
        sigmas = model.schedule.sigma(timesteps)
        return io.NodeOutput(torch.cat([sigmas, sigmas.new_zeros(1)]))


class SplitSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SplitSigmas",
            category="model/sampling/sigmas",
            description="The levels up to a step, and those from it on.",
            inputs=[io.Sigmas.Input("sigmas"), io.Int.Input("step", default=0, min=0, max=10000)],
            outputs=[io.Sigmas.Output(display_name=f"{half}_sigmas") for half in ("high", "low")],
        )

    @classmethod
    def execute(cls, sigmas: Tensor, step):
        return io.NodeOutput(sigmas[: step + 1], sigmas[step:])


class FlipSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FlipSigmas",
            category="model/sampling/sigmas",
            description="The levels in reverse, for inversion; a first level of 0 becomes 0.0001.",
            inputs=[io.Sigmas.Input("sigmas")],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, sigmas: Tensor):
        flipped = sigmas.flip(0)
        if len(flipped) and flipped[0] == 0:
            flipped[0] = 0.0001
        return io.NodeOutput(flipped)


class ManualSigmas(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ManualSigmas",
            category="model/sampling/sigmas",
            description="Levels typed by hand.",
            inputs=[io.String.Input("sigmas", default="1, 0.5", multiline=False)],
            outputs=[io.Sigmas.Output()],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, sigmas: str):
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
