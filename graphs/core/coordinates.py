"""Core's model patches that change the coordinates a model samples in."""

from __future__ import annotations

from dataclasses import replace

from ...hosts.headless.model import Model, Prediction
from ...sampling.path import VE, NoisePath
from ...sampling.schedule import DiscreteSchedule, FlowSchedule, FluxSchedule
from ..api import io
from .declare import core_node


@core_node(
    category="model/patch/stable diffusion",
    inputs=[io.Model.Input("model"), io.Float.Input("shift", default=3.0, min=0.0, max=100.0, step=0.01)],
    outputs=[io.Model.Output()],
)
def ModelSamplingSD3(model: Model, shift: float):
    """A flow model's timestep shift."""
    schedule = FlowSchedule(shift=shift, noise_scale=model.path.noise_scale)
    return io.NodeOutput(model.with_sampling(schedule, NoisePath("FLOW", model.path.noise_scale), "flow"))


@core_node(
    category="model/patch/flux",
    inputs=[
        io.Model.Input("model"),
        io.Float.Input("max_shift", default=1.15, min=0.0, max=100.0, step=0.01),
        io.Float.Input("base_shift", default=0.5, min=0.0, max=100.0, step=0.01),
        io.Int.Input("width", default=1024, min=16, max=16384, step=8),
        io.Int.Input("height", default=1024, min=16, max=16384, step=8),
    ],
    outputs=[io.Model.Output()],
)
def ModelSamplingFlux(model: Model, max_shift, base_shift, width, height):
    """Flux's timestep shift, from the picture's size."""
    # Linear in the number of tokens (16 x 16 pixels each), base_shift at 256 of them and max_shift at 4096.
    slope = (max_shift - base_shift) / (4096 - 256)
    shift = width * height / 256 * slope + base_shift - slope * 256
    return io.NodeOutput(model.with_sampling(FluxSchedule(shift), NoisePath("FLOW"), "flow"))


_PREDICTIONS: dict[str, Prediction] = {"eps": "eps", "v_prediction": "v", "x0": "x0"}


@core_node(
    category="model/patch",
    inputs=[
        io.Model.Input("model"),
        io.Combo.Input("sampling", list(_PREDICTIONS)),
        io.Boolean.Input("zsnr", default=False, advanced=True),
    ],
    outputs=[io.Model.Output()],
)
def ModelSamplingDiscrete(model: Model, sampling: str, zsnr: bool):
    """What a Stable Diffusion network predicts, and whether its schedule ends in pure noise."""
    old = model.schedule if isinstance(model.schedule, DiscreteSchedule) else DiscreteSchedule()
    return io.NodeOutput(model.with_sampling(replace(old, zsnr=zsnr), VE, _PREDICTIONS[sampling]))


NODES = [ModelSamplingSD3, ModelSamplingFlux, ModelSamplingDiscrete]
