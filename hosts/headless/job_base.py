"""What a job calls a headless MODEL and VAE, and the way back; see `hosts.contract`."""

from __future__ import annotations

import math
from dataclasses import replace

from ...files import weights as files
from ...files.errors import UsageError
from ...sampling.schedule import FlowSchedule, FluxSchedule, Schedule
from ...trainers import sources
from . import embedded, folders, loaders
from .model import Lora, Model, Vae


def describe_base(model: Model) -> sources.Base | None:
    """See `hosts.contract`."""
    origin = model.origin
    if origin is None:
        return None
    shift = None
    if model.schedule != origin.schedule:
        shift = _shift(model.schedule)
        if shift is None:
            return None
    if not all(lora.name for lora in model.loras):
        return None
    loras = tuple(sources.AppliedLora(lora.name, float(lora.strength)) for lora in model.loras)
    return replace(origin.base, shift=shift, loras=loras)


def load_base(base: sources.Base) -> Model:
    """See `hosts.contract`."""
    if base.kind == "embedded":
        model = embedded.load(base.variant)[0]
    elif base.kind == "checkpoint":
        model = loaders.checkpoint(base.file)[0]
    elif base.kind == "diffusion_model":
        model = loaders.diffusion_model(base.file)
    elif base.kind == "diffusers":
        model = loaders.diffusers(base.folder)[0]
    else:
        raise UsageError(
            "the base of this job was merged by ComfyUI, and only ComfyUI loads it as it was: start it with "
            "--comfyui DIR"
        )
    for lora in base.loras:
        state = files.load(folders.current().model("loras", lora.file))
        model = model.with_lora(Lora(lora.file, state, lora.strength))
    return model if base.shift is None else replace(model, schedule=_shifted(model.schedule, base.shift))


def load_vae(vae: sources.Vae) -> Vae:
    """See `hosts.contract`."""
    if vae.kind == "embedded":
        return embedded.load(vae.variant)[2]
    if vae.kind == "vae":
        return loaders.vae(vae.file)
    load = loaders.checkpoint if vae.kind == "checkpoint" else loaders.diffusers
    found = load(vae.file or vae.folder)[2]
    if found is None:
        raise UsageError(f"{vae.file} holds no VAE; name one of the vae folder")
    return found


def _shift(schedule: Schedule) -> float | None:
    if isinstance(schedule, FlowSchedule):
        return schedule.shift
    return math.exp(schedule.shift) if isinstance(schedule, FluxSchedule) else None


def _shifted(schedule: Schedule, shift: float) -> Schedule:
    if isinstance(schedule, FlowSchedule):
        return replace(schedule, shift=shift)
    if isinstance(schedule, FluxSchedule):
        return FluxSchedule(math.log(shift))
    raise UsageError(f"base.shift {shift:g} cannot be set: only flow models have a timestep shift")
