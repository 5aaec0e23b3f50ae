"""Weights in each of ComfyUI's quantised formats, as its files hold them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

TURNED = {"convrot_groupsize": 64}
# By a name: format, how core makes such weights, and what a layer in a file says of them besides.
FORMATS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fp8_scaled": ("float8_e4m3fn", {"scale": "recalculate"}, {}),
    "fp8_scaled e5m2": ("float8_e5m2", {"scale": "recalculate"}, {}),
    "scaled_fp8": ("float8_e4m3fn", {"scale": "recalculate"}, {}),
    "mxfp8": ("mxfp8", {}, {}),
    "nvfp4": ("nvfp4", {}, {}),
    "int8": ("int8_tensorwise", {}, {}),
    "int8 by channel": ("int8_tensorwise", {"per_channel": True}, {}),
    "int8_convrot": ("int8_tensorwise", {"per_channel": True, "convrot": True, **TURNED}, {"convrot": True, **TURNED}),
    "convrot_w4a4": ("convrot_w4a4", TURNED, TURNED),
    "asym_w4a8_int8": ("asym_w4a8_int8", TURNED, TURNED),
}


def quantised(
    weights: Mapping[str, Tensor], kind: str, chosen: Collection[str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file's weights in one of ComfyUI's formats, and the same numbers multiplied out.

    chosen: the names of those that are stored so; None for every matrix of a block whose sides are multiples of 64.
    """
    if kind == "plain fp8":
        out = {name: value.to(torch.float8_e4m3fn) for name, value in weights.items()}
        return out, {name: value.float() for name, value in out.items()}
    core: Any = importlib.import_module("comfy.quant_ops")
    form, made, said = FORMATS[kind]
    out, exact = dict(weights), dict(weights)
    for name, value in weights.items():
        if name not in chosen if chosen is not None else "block" not in name or not divides(value):
            continue
        value = value.bfloat16() if form in ("nvfp4", "mxfp8") else value
        small = core.QuantizedTensor.from_float(value, core.QUANT_ALGOS[form]["comfy_tensor_layout"], **made)
        layer = name.removesuffix("weight")
        exact[name] = small.dequantize().float()
        del out[name]
        out |= {key: part.contiguous() for key, part in small.state_dict(name).items()}
        if kind == "scaled_fp8":
            out[f"{layer}scale_weight"] = out.pop(f"{layer}weight_scale")
            continue
        told = json.dumps({"format": form, **said}).encode()
        out[f"{layer}comfy_quant"] = torch.tensor(list(told), dtype=torch.uint8)
    if kind == "scaled_fp8":
        out["scaled_fp8"] = torch.tensor([], dtype=torch.float8_e4m3fn)
    return out, exact


def divides(weight: Tensor) -> bool:
    """Whether a weight is a matrix that every format takes."""
    return weight.ndim == 2 and not any(side % 64 for side in weight.shape)
