"""Layers whose weights are stored in another precision than they compute in, computed as their numbers stand.

ComfyUI's own kernels for weights of 8 bits and less round the inputs as well, which is right where a picture is
sampled: it is not what adapters should make up for, and with some formats a tenth of the output. Autograd keeps the
weight as it is stored and nothing else: neither the input, since the weight is frozen, nor the numbers multiplied out
or cast, which in fp32 would be twice a 16-bit base.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import comfy.ops
import torch
import torch.nn.functional as F
import torch.nn.grad
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


class _Convolution(torch.autograd.Function):
    """A convolution of x with a weight and a bias, differentiated by x; settings: stride, padding, dilation, groups."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.settings = x.shape, settings
        return _CONVOLUTIONS[weight.ndim][0](x, weight.to(x.dtype), bias, *settings)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        by_input = _CONVOLUTIONS[weight.ndim][1]
        return by_input(ctx.shape, weight.to(gradient.dtype), gradient, *ctx.settings), None, None, None


# By the weight's dimensions.
_CONVOLUTIONS = {3: (F.conv1d, torch.nn.grad.conv1d_input), 4: (F.conv2d, torch.nn.grad.conv2d_input)}


def _convolved(layer: nn.Module, x: Tensor) -> Tensor:
    comfy.ops.run_every_op()  # hears the user's cancel
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return _Convolution.apply(x, layer.weight, bias, (layer.stride, layer.padding, layer.dilation, layer.groups))


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


def cast(layer: nn.Module) -> bool:
    """Whether a layer is one of ComfyUI's ordinary ones that cast their weights for each product."""
    if not isinstance(layer, comfy.ops.CastWeightBiasOp) or not type(layer).comfy_cast_weights:
        return False
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return isinstance(layer, nn.Linear)


def exact_layers(network: nn.Module) -> None:
    """Let the layers with small weights of a network of one's own compute exactly, and none leave cast weights behind.

    Layers whose weights ComfyUI changes as they run, or brings to the device, are left alone.
    """
    layer: Any
    for layer in network.modules():
        brought = hasattr(layer, "prev_comfy_cast_weights")  # where ComfyUI keeps what it says of others
        if (small(layer) or cast(layer)) and not (brought or layer.weight_function or layer.bias_function):
            layer.forward = MethodType(_convolved if isinstance(layer, nn.Conv1d | nn.Conv2d) else _forward, layer)
        elif hasattr(layer, "_full_precision_mm"):  # banks of experts, whose kernels pass no gradient on
            layer._full_precision_mm = True
