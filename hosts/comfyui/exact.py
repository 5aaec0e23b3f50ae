"""Layers with weights of 8 bits and less, computed as their numbers stand: multiplied out, then used like others.

ComfyUI's own kernels for such weights round the inputs as well, which is right where a picture is sampled: it is not
what adapters should make up for, and with some formats a tenth of the output. Autograd keeps the weight as it is stored
and nothing else: neither the input, since the weight is frozen, nor the numbers multiplied out.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import comfy.ops
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = {
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
}  # fmt: skip


def _plain(weight: Tensor, dtype: torch.dtype) -> Tensor:
    weight = weight.to(dtype=dtype)
    return weight.dequantize() if isinstance(weight, comfy.ops.QuantizedTensor) else weight


class _Product(torch.autograd.Function):
    """x W^T + b, differentiated by x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, _plain(weight, x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ _plain(weight, gradient.dtype), None, None


def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    comfy.ops.run_every_op()  # hears the user's cancel
    smooth = dict(layer.named_parameters(recurse=False)).get("pre_quant_scale")
    if smooth is not None:
        x = x * smooth.to(x.dtype)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return _Product.apply(x, layer.weight, bias)


def small(layer: nn.Module) -> bool:
    """Whether a layer is one of ComfyUI's linear ones with weights of 8 bits or less."""
    if not isinstance(layer, comfy.ops.CastWeightBiasOp) or type(layer).__name__ != "Linear":
        return False
    weight = layer.weight
    return isinstance(weight, comfy.ops.QuantizedTensor) or (weight is not None and weight.dtype in SMALL)


def exact_layers(network: nn.Module) -> None:
    """Let the layers with small weights of a network of one's own compute exactly."""
    for layer in network.modules():
        if small(layer) and not layer.weight_function and not layer.bias_function:
            layer.forward = MethodType(_forward, layer)
        elif hasattr(layer, "_full_precision_mm"):  # banks of experts, whose kernels pass no gradient on
            layer._full_precision_mm = True
