"""`comfy_api.latest.io` without ComfyUI: the names that V3 nodes use, so that one node class serves both hosts."""

from __future__ import annotations

from typing import Any, ClassVar

from . import inputs as _in
from .inputs import (
    ControlAfterGenerate,
    DynamicInput,
    FolderType,
    Input,
    NumberDisplay,
    Output,
    UploadType,
    WidgetInput,
)
from .schema import ComfyExtension, ComfyNode, Hidden, HiddenHolder, NodeOutput, Schema


class ComfyType:
    """A type of socket: its `io_type`, its Python `Type`, and its Input and Output classes."""

    io_type: ClassVar[str] = "*"
    Type: ClassVar[Any] = Any
    Input: ClassVar[Any] = _in.Input
    Output: ClassVar[Any] = _in.Output


def _type(io_type: str, python: Any = Any, input: type = _in.Input, output: type = _in.Output, **extra) -> Any:
    """A socket type whose Input and Output classes know its name."""
    body = {
        "io_type": io_type,
        "Type": python,
        "Input": type("Input", (input,), {"io_type": io_type}),
        "Output": type("Output", (output,), {"io_type": io_type}),
    }
    return type(io_type.title(), (ComfyType,), {**body, **extra})


def Custom(io_type: str) -> Any:
    """A socket type of one's own."""
    return _type(io_type)


Boolean = _type("BOOLEAN", bool, _in.BooleanInput)
Int = _type("INT", int, _in.IntInput)
Float = _type("FLOAT", float, _in.FloatInput)
String = _type("STRING", str, _in.StringInput)
Combo = _type("COMBO", str, _in.ComboInput, _in.ComboOutput)

Model = _type("MODEL")
Clip = _type("CLIP")
Vae = _type("VAE")
Conditioning = _type("CONDITIONING", list)
Latent = _type("LATENT", dict)
Image = _type("IMAGE")
Mask = _type("MASK")
Sampler = _type("SAMPLER")
Sigmas = _type("SIGMAS")
Guider = _type("GUIDER")
Noise = _type("NOISE")
LoraModel = _type("LORA_MODEL", dict)
LossMap = _type("LOSS_MAP", dict)
AnyType = _type("*")

DynamicCombo = _type("COMFY_DYNAMICCOMBO_V3", dict, _in.DynamicComboInput, Option=_in.DynamicComboOption)
Autogrow = _type(
    "COMFY_AUTOGROW_V3",
    dict,
    _in.AutogrowInput,
    TemplatePrefix=_in.TemplatePrefix,
    TemplateNames=_in.TemplateNames,
)

__all__ = [
    "AnyType", "Autogrow", "Boolean", "Clip", "Combo", "ComfyExtension", "ComfyNode", "ComfyType", "Conditioning",
    "ControlAfterGenerate", "Custom", "DynamicCombo", "DynamicInput", "Float", "FolderType", "Guider", "Hidden",
    "HiddenHolder", "Image", "Input", "Int", "Latent", "LoraModel", "LossMap", "Mask", "Model", "NodeOutput",
    "Noise", "NumberDisplay", "Output", "Sampler", "Schema", "Sigmas", "String", "UploadType", "Vae", "WidgetInput",
]  # fmt: skip
