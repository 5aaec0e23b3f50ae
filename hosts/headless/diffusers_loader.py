"""SD1.5, SDXL, SD3 and Flux from one safetensors file in the published layout, run by diffusers and transformers.

Nothing is downloaded. Precision: fp32 on the CPU; on a GPU fp16 for UNets and bf16 for transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files import weights as files
from ...files.errors import UsageError
from ...models.layouts import dit as layout_dit
from ...models.layouts import unet as layout_unet
from . import text_encoders, tokenizers, vaes
from .device import dtype
from .families import FLUX, SD3, SD15, SDXL, Family, Shapes, as_model, bare_module, coordinates, require_diffusers
from .model import Clip, Model, Vae

_NETWORK, _VAES = "model.diffusion_model.", ("first_stage_model.", "vae.")
_SD15_TEXT = ("cond_stage_model.transformer.", "text_encoders.clip_l.transformer.")
_SDXL_TEXT = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
_TEXT = "text_encoders.{}.transformer."


def load_checkpoint(path: Path) -> tuple[Model, Clip | None, Vae | None]:
    """MODEL, CLIP and VAE of a file; None for what it does not hold. UsageError names the fault."""
    require_diffusers()
    with torch.inference_mode(False):
        shapes = files.shapes(path)
        family = _family(_stripped(shapes))
        model = _model(path, shapes)
        prefix = next((p for p in _VAES if any(name.startswith(p) for name in shapes)), None)
        vae = None if prefix is None else vaes.from_state(files.load(path, prefix))
        return model, _clip(path, shapes, family), vae


def load_diffusion_model(path: Path) -> Model:
    """MODEL of a file that may hold the network alone."""
    require_diffusers()
    with torch.inference_mode(False):
        return _model(path, files.shapes(path))


def load_vae(path: Path) -> Vae:
    """VAE of a file of its own."""
    require_diffusers()
    with torch.inference_mode(False):
        state = files.load(path)
        prefix = next((p for p in _VAES if any(name.startswith(p) for name in state)), "")
        return vaes.from_state({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})


def _stripped(shapes: Shapes) -> Shapes:
    """The network's names without their prefix, where the file has one."""
    prefixed = any(name.startswith(_NETWORK) for name in shapes)
    return {n.removeprefix(_NETWORK): s for n, s in shapes.items() if n.startswith(_NETWORK) or not prefixed}


def _family(shapes: Shapes) -> Family:
    if layout_dit.is_sd3(shapes):
        return SD3
    if layout_dit.is_flux(shapes):
        return FLUX
    if layout_unet.is_unet(shapes):
        return SDXL if "label_emb.0.0.weight" in shapes else SD15
    raise UsageError("the file is no model that the headless host knows (SD1.5, SDXL, SD3, Flux); run it in ComfyUI")


def _model(path: Path, shapes: Shapes) -> Model:
    stripped = _stripped(shapes)
    family = _family(stripped)
    config = family.config(stripped)
    schedule, way, prediction = coordinates(family, shapes, config)

    def build() -> Any:
        import diffusers

        prefixed = any(name.startswith(_NETWORK) for name in shapes)
        table = family.layout(config)
        converted, _ = table.convert(files.load(path, _NETWORK if prefixed else ""))
        with torch.device("meta"):
            module = getattr(diffusers, family.diffusers_class)(**config)
        precision = dtype(family.precision)
        converted = {name: value.to(precision) for name, value in converted.items()}
        missing, unexpected = module.load_state_dict(converted, strict=False, assign=True)
        if missing or unexpected:
            name = (missing or unexpected)[0]
            raise UsageError(
                f"{path.name} is no whole {family.name} model: tensor {name} is {'missing' if missing else 'unknown'}; "
                "download it again, or run it in ComfyUI"
            )
        return module

    return as_model(family, build, schedule, way, prediction, lambda: bare_module(family, config))


def _clip(path: Path, shapes: Shapes, family: Family) -> Clip | None:
    """The text encoders that the file holds, loaded at the first prompt; None where one of them is not there."""
    prefixes = {
        "SD1.5": _SD15_TEXT[:1] if any(n.startswith(_SD15_TEXT[0]) for n in shapes) else _SD15_TEXT[1:],
        "SDXL": _SDXL_TEXT,
        "SD3": (_TEXT.format("clip_l"), _TEXT.format("clip_g")),
        "Flux": (_TEXT.format("clip_l"), _TEXT.format("t5xxl")),
    }[family.name]
    if not all(any(name.startswith(p) for name in shapes) for p in prefixes):
        return None
    t5_prefix = _TEXT.format("t5xxl")
    made: list[Clip] = []

    def part(prefix: str) -> dict[str, Tensor]:
        return files.load(path, prefix)

    def build() -> Clip:
        words = tokenizers.find("clip")
        under: Any = "last" if family.name in ("SD1.5", "Flux") else "penultimate"
        first = ("lora_te_", "lora_te1_", "text_encoder.")
        clip_l = text_encoders.clip_encoder(part(prefixes[0]), words, "quick_gelu", hidden=under, lora_prefixes=first)
        if family is SD15:
            return text_encoders.sd15(clip_l)
        if family is FLUX:
            t5 = text_encoders.t5_encoder(part(t5_prefix), tokenizers.find("t5"), least=256)
            return text_encoders.flux(clip_l, t5)
        second = ("lora_te2_", "text_encoder_2.")
        clip_g = text_encoders.clip_encoder(
            part(prefixes[1]), words, "gelu", hidden="penultimate", projected=True, lora_prefixes=second
        )
        if family is SDXL:
            return text_encoders.sdxl(clip_l, clip_g)
        has_t5 = any(name.startswith(t5_prefix) for name in shapes)
        last = text_encoders.t5_encoder(part(t5_prefix), tokenizers.find("t5"), least=77) if has_t5 else None
        return text_encoders.sd3(clip_l, clip_g, last, _stripped(shapes)["context_embedder.weight"][1])

    def encode(prompt, loras):
        if not made:
            with torch.inference_mode(False):
                made.append(build())
        return made[0].encoder(prompt, loras)

    return Clip(encode)
