"""A MODEL of ComfyUI's from a file's header alone: its network on torch's meta device, as stored, without a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_detection
import comfy.model_patcher
import comfy.utils
import torch
from safetensors import safe_open
from torch import Tensor

from ...files.in_turn import DTYPES
from ...trainers.weightless import META

# Below so many bytes a tensor is read: formats of quantised layers are told in such.
SMALL = 4096
Config = Any  # of comfy.supported_models
# What text encoders give each family: tokens that ComfyUI's own encoders make of a prompt of usual length.
LENGTHS = {
    "SD15": 77, "SDXL": 77, "SD3": 154, "Flux": 512, "FluxSchnell": 256, "Flux2": 512, "WAN21_T2V": 512,
    "WAN22_T2V": 512,
}  # fmt: skip
USUAL = 256
_WIDTHS = ("context_dim", "context_in_dim", "cap_feat_dim", "text_dim", "joint_attention_dim")
_KNOWN_WIDTHS = {"QwenImage": 3584, "WAN21_T2V": 4096, "WAN22_T2V": 4096, "SD3": 4096}


def header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors without their numbers, small ones apart, and its metadata."""
    state = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - no dictionary
            part = file.get_slice(name)
            dtype = _dtype(part.get_dtype())
            shape = part.get_shape()
            size = dtype.itemsize * torch.Size(shape).numel()
            state[name] = file.get_tensor(name) if size <= SMALL else torch.empty(shape, dtype=dtype, device=META)
        return state, file.metadata() or {}


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"the file holds tensors of type {name}, which no training here reads")
    return DTYPES[name]


def from_file(path: Path) -> Any:
    """The MODEL of a diffusion model's or a checkpoint's file. ValueError for one that ComfyUI does not know."""
    state, metadata = header(path)
    state, metadata = comfy.utils.convert_old_quants(state, "", metadata=metadata)
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state)
    inner = comfy.utils.state_dict_prefix_replace(state, {prefix: ""}, filter_keys=True)
    state = inner or state
    config = comfy.model_detection.model_config_from_unet(state, "", metadata=metadata)
    if config is None:
        raise ValueError(f"{path.name} is no diffusion model that ComfyUI knows by its tensors")
    if config.quant_config is not None:
        return model_of(config, torch.bfloat16, state)
    held = comfy.utils.weight_dtype(state) or torch.bfloat16
    return model_of(config, torch.bfloat16 if held == torch.float32 else held)


def model_of(config: Config, dtype: torch.dtype, state: dict[str, Tensor] | None = None) -> Any:
    """The MODEL of a configuration; state: tensors whose formats its layers take."""
    config.set_inference_dtype(dtype, torch.bfloat16 if dtype.itemsize < 2 else None)
    with torch.inference_mode(False), META:
        base = config.get_model(state or {}, "")
        if state is not None:
            base.load_model_weights(state, "")
    # What is no network is made with its numbers.
    base.model_sampling = comfy.model_base.model_sampling(config, base.model_type)
    base.requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(base, load_device=META, offload_device=META)


def prompt_of(model: Any, tokens: int = 0) -> tuple[Tensor, dict[str, Any]]:
    """A CONDITIONING entry of the size that the model's text encoders give; tokens: its length, 0 for the usual one.

    ValueError where the model does not say how wide its text is.
    """
    config = model.model.model_config
    kind, settings = type(config).__name__, config.unet_config
    width = next((settings[name] for name in _WIDTHS if settings.get(name)), _KNOWN_WIDTHS.get(kind))
    if not width:
        raise ValueError(f"how wide the prompts of {kind} are is not known here: use the node Training Plan instead")
    pooled = settings.get("vec_in_dim") or settings.get("adm_in_channels") or 0
    extra = {"pooled_output": torch.zeros(1, 1280 if kind == "SDXL" else pooled)} if pooled else {}
    return torch.zeros(1, tokens or LENGTHS.get(kind, USUAL), int(width)), extra


def latent_of(model: Any, width: int, height: int, frames: int = 1) -> tuple[int, ...]:
    """Shape (C, ...) of the model's latents of a picture, or of a video of so many frames."""
    form = model.model.latent_format
    side = form.spacial_downscale_ratio
    shape = (form.latent_channels, height // side, width // side)
    if form.latent_dimensions != 3:
        return shape
    return (shape[0], (frames - 1) // (form.temporal_downscale_ratio or 1) + 1, *shape[1:])
