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
MultiCombo = _type("COMBO", list[str], _in.MultiComboInput)

Model = _type("MODEL")
Clip = _type("CLIP")
ClipVision = _type("CLIP_VISION")
ClipVisionOutput = _type("CLIP_VISION_OUTPUT")
Vae = _type("VAE")
ControlNet = _type("CONTROL_NET")
Conditioning = _type("CONDITIONING", list)
Latent = _type("LATENT", dict)
Image = _type("IMAGE")
Mask = _type("MASK")
Audio = _type("AUDIO", dict)
Video = _type("VIDEO")
Sampler = _type("SAMPLER")
Sigmas = _type("SIGMAS")
Guider = _type("GUIDER")
Noise = _type("NOISE")
LoraModel = _type("LORA_MODEL", dict)
LossMap = _type("LOSS_MAP", dict)
ModelPatch = _type("MODEL_PATCH")
Hooks = _type("HOOKS")
UpscaleModel = _type("UPSCALE_MODEL")
StyleModel = _type("STYLE_MODEL")
Color = _type("COLOR", str, _in.WidgetInput)
Dict = _type("DICT", dict)
Array = _type("ARRAY", list)
AnyType = _type("*")

MultiType = _type("COMFY_MULTITYPED_V3", Any, _in.MultiTypeInput)
MatchType = _type("COMFY_MATCHTYPE_V3", Any, _in.MatchInput, _in.MatchOutput, Template=_in.MatchTemplate)
DynamicCombo = _type("COMFY_DYNAMICCOMBO_V3", dict, _in.DynamicComboInput, Option=_in.DynamicComboOption)
Autogrow = _type(
    "COMFY_AUTOGROW_V3",
    dict,
    _in.AutogrowInput,
    TemplatePrefix=_in.TemplatePrefix,
    TemplateNames=_in.TemplateNames,
)

__all__ = [
    "AnyType", "Array", "Audio", "Autogrow", "Boolean", "Clip", "ClipVision", "ClipVisionOutput", "Color", "Combo",
    "ComfyExtension", "ComfyNode", "ComfyType", "Conditioning", "ControlAfterGenerate", "ControlNet", "Custom", "Dict",
    "DynamicCombo", "DynamicInput", "Float", "FolderType", "Guider", "Hidden", "HiddenHolder", "Hooks", "Image",
    "Input", "Int", "Latent", "LoraModel", "LossMap", "Mask", "MatchType", "Model", "ModelPatch", "MultiCombo",
    "MultiType", "NodeOutput", "Noise", "NumberDisplay", "Output", "Sampler", "Schema", "Sigmas", "String",
    "StyleModel", "UploadType", "UpscaleModel", "Vae", "Video", "WidgetInput",
]  # fmt: skip
