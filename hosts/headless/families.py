"""The model families that run through diffusers, and how a network becomes a MODEL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from ...files.errors import UsageError
from ...models.layouts import dit as layout_dit
from ...models.layouts import unet as layout_unet
from ...models.layouts.renames import Layout
from ...sampling.path import FLOW, VE, NoisePath
from ...sampling.schedule import DiscreteSchedule, FlowSchedule, FluxSchedule, Schedule
from . import networks
from .device import device, has_xformers
from .model import LatentFormat, Model, NetworkSource, Prediction

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """What belongs to a family of models: diffusers' class, its table, the adapter, latents and precision on a GPU."""

    name: str
    diffusers_class: str
    config: Callable[[Shapes], dict[str, Any]]
    layout: Callable[[Any], Layout]
    network: Any
    latent: LatentFormat
    precision: torch.dtype


SD15 = Family(
    "SD1.5", "UNet2DConditionModel", layout_unet.config, layout_unet.layout, networks.UNet,
    LatentFormat(4, scale=0.18215), torch.float16,
)  # fmt: skip
SDXL = Family(
    "SDXL", "UNet2DConditionModel", layout_unet.config, layout_unet.layout, networks.UNet,
    LatentFormat(4, scale=0.13025), torch.float16,
)  # fmt: skip
SD3 = Family(
    "SD3", "SD3Transformer2DModel", layout_dit.sd3_config, layout_dit.sd3_layout, networks.SD3,
    LatentFormat(16, scale=1.5305, shift=0.0609), torch.bfloat16,
)  # fmt: skip
FLUX = Family(
    "Flux", "FluxTransformer2DModel", layout_dit.flux_config, layout_dit.flux_layout, networks.Flux,
    LatentFormat(16, scale=0.3611, shift=0.1159), torch.bfloat16,
)  # fmt: skip


def bare_module(family: Family, config: dict[str, Any]) -> Any:
    """diffusers' network of a family without weights, in the precision that the family has on a GPU."""
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, family.diffusers_class)(**config).to(family.precision)


def require_diffusers() -> None:
    """Quiet diffusers and transformers; UsageError naming the extra when one is not installed."""
    if find_spec("diffusers") is None or find_spec("transformers") is None:
        raise UsageError('checkpoints need diffusers and transformers here: pip install "retort[diffusers]"')
    import diffusers
    import transformers

    # Their bars and remarks would stand between our own.
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()


def coordinates(family: Family, shapes: Shapes, config: Any) -> tuple[Schedule, NoisePath, Prediction]:
    """Schedule, path and prediction, by the marks that files carry: "v_pred", "ztsnr", Flux dev's guidance."""
    if family is SD3:
        return FlowSchedule(shift=3.0), FLOW, "flow"
    if family is FLUX:
        # dev is told its guidance and has a shift; schnell has neither.
        return (FluxSchedule() if config["guidance_embeds"] else FlowSchedule(multiplier=1.0)), FLOW, "flow"
    if "edm_mean" in shapes or "edm_vpred.sigma_max" in shapes:
        raise UsageError("this is an EDM model, which needs ComfyUI")
    is_v = "v_pred" in shapes
    return DiscreteSchedule(zsnr=is_v and "ztsnr" in shapes), VE, "v" if is_v else "eps"


def as_model(
    family: Family, build, schedule: Schedule, way: NoisePath, prediction: Prediction, bare: Callable[[], Any]
) -> Model:
    """A MODEL whose network is built when it is first used; its LoRAs share the weights. bare: see NetworkSource."""
    built: list[Any] = []

    def made(module: Any) -> Any:
        return family.network(module, family.layout(module.config))

    def network(loras):
        if not built:
            built.append(made(build().to(device())))
            if has_xformers() and family.network is networks.UNet:
                built[0].module.enable_xformers_memory_efficient_attention()
        return built[0].with_loras(loras)

    def merged(loras):
        # For training, where torch's own attention has the surer gradients.
        network = made(build()).merge(loras)
        network.device = device()
        return network

    def outline() -> Any:
        module = bare()
        return family.network(module, family.layout(module.config))

    return Model(NetworkSource(network, merged, outline), schedule, way, prediction, family.latent)
