"""What a network is, told by ComfyUI's own classes, and which of them cannot be trained or searched on."""

from __future__ import annotations

from typing import Any, cast

import comfy.model_base
from comfy.ldm.flux.model import Flux
from comfy.ldm.hidream_o1.model import HiDreamO1Transformer
from comfy.ldm.hunyuan_video.model import HunyuanVideo
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import nn

from ..training.lora_files import Family


def family_of(network: nn.Module) -> Family | None:
    """Whose names the layers of a network have in files that diffusers reads; None where it has no table for them."""
    if isinstance(network, MMDiT):
        return "sd3"
    # Later models of the class (Flux 2, LongCat, Ovis) have no pooled text, and diffusers other classes for them.
    if type(network) is Flux and cast(Any, network.params).vec_in_dim is not None:
        return "flux"
    return "unet" if type(network) is UNetModel else None


def frames_are_the_batch(base: Any) -> bool:
    """Whether a BaseModel takes a batch for the frames of one video (Stable Video Diffusion, SV3D)."""
    return isinstance(base, comfy.model_base.SVD_img2vid)


def one_level_only(base: Any) -> bool:
    """Whether a BaseModel's network is told of the level that comes next, which it looks up for the whole batch.

    MeanFlow: the distilled HunyuanVideo 1.5 and HunyuanImage 2.1. The refiner has the layer too and does not use it.
    """
    network = base.diffusion_model
    refines = isinstance(base, comfy.model_base.HunyuanImage21Refiner)
    return isinstance(network, HunyuanVideo) and network.time_r_in is not None and not refines


def forget_earlier_calls(network: nn.Module) -> None:
    """Let a network not use what it keeps of earlier calls, whose weights and graph were others."""
    if isinstance(network, HiDreamO1Transformer):
        network.clear_kv_cache()


def refuse_untrainable(base: Any) -> None:
    """ValueError for a BaseModel whose network cannot be trained sample by sample and level by level."""
    found = None
    if frames_are_the_batch(base):
        found = "takes a batch for the frames of one video", "a video model whose latents have frames of their own"
    elif one_level_only(base):
        found = "is a MeanFlow model, which is told of a sampler's next level", "the model that it was distilled from"
    if found is not None:
        raise ValueError(
            f"model ({type(base.model_config).__name__}) {found[0]}, so it cannot be trained on single samples at "
            f"single levels: train {found[1]}"
        )


def refuse_unsearchable(base: Any) -> None:
    """ValueError for a BaseModel of which a search cannot sample several candidates."""
    if frames_are_the_batch(base):
        raise ValueError(
            f"the guider's model ({type(base.model_config).__name__}) takes a batch for the frames of one video, and a "
            "search would take the frames for candidates: search with a video model whose latents have frames of "
            "their own, such as Wan"
        )
