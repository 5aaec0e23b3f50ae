"""LoRA products in the precision of what comes in, while the weights that learn and their gradients stay in fp32.

In bf16 a layer's output is written once: the adapter's product is added within the base's own, and on the way back the
adapter's share of the input's gradient within the base's. Written as a sum of terms, as PEFT has it, a layer has four
outputs at its widest moment and two gradients of its input, which decides how much memory a checkpointed block takes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def _alike(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    # fp16 has too small a range for a gradient that passes lora_B while that is nearly zero: there x goes up instead.
    if x.dtype == torch.bfloat16:
        return x, weight.to(x.dtype)
    return x.to(weight.dtype), weight


class Linear(nn.Linear):
    """A linear layer whose weight is cast to its input's bf16; on any other input it is torch's."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return functional.linear(*_alike(input, self.weight))


def _convolution(kind: type[nn.Module], function: Callable[..., Tensor]) -> type[nn.Module]:
    def forward(self, input: Tensor) -> Tensor:
        x, weight = _alike(input, self.weight)
        return function(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    return type(kind.__name__, (kind,), {"forward": forward, "__doc__": "As `Linear`, a convolution."})


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: Linear,
    nn.Conv1d: _convolution(nn.Conv1d, functional.conv1d),
    nn.Conv2d: _convolution(nn.Conv2d, functional.conv2d),
    nn.Conv3d: _convolution(nn.Conv3d, functional.conv3d),
}


class _Down(torch.autograd.Function):
    """x (..., in), lora_A (rank, in) -> x for the base's layer, and x A^T.

    The gradient that comes back for x is the base layer's own product, which nobody else has; A's share is added to it
    in place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return x, functional.linear(x, weight.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, base: Tensor | None, low: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        low = low.flatten(0, -2)
        learnt = (low.t() @ x.flatten(0, -2)).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, learnt
        cast = weight.to(x.dtype)
        if base is None:
            return (low @ cast).view(x.shape), learnt
        if not base.is_contiguous():
            return base + (low @ cast).view(x.shape), learnt
        rows = base.flatten(0, -2)
        torch.addmm(rows, low, cast, out=rows)
        return base, learnt


class _Up(torch.autograd.Function):
    """out += scale * (low B^T), where out is a base layer's: (..., out), with channels (B, out, ...).

    No frozen layer keeps its output for the backward pass, so that it may be written to.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, low: Tensor, weight: Tensor, scale: float, channels: bool) -> Tensor:
        ctx.save_for_backward(low, weight)
        ctx.scale, ctx.channels = scale, channels
        return _added(out, low, weight.to(out.dtype), scale, channels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        low, weight = ctx.saved_tensors
        up = weight.flatten(1).to(gradient.dtype)
        if ctx.channels:
            wide = gradient.flatten(2)
            back = (up.t() @ wide).view(low.shape)
            learnt = torch.bmm(wide, low.flatten(2).transpose(1, 2)).sum(0)
        else:
            wide = gradient.flatten(0, -2)
            back = (wide @ up).view(low.shape)
            learnt = wide.t() @ low.flatten(0, -2)
        return gradient, back * ctx.scale, (learnt * ctx.scale).view(weight.shape).to(weight.dtype), None, None


def _added(out: Tensor, low: Tensor, weight: Tensor, scale: float, channels: bool) -> Tensor:
    """`_Up`, in place where out lies in one piece."""
    here = out if out.is_contiguous() else out.clone(memory_format=torch.contiguous_format)
    up = weight.flatten(1)
    if channels:
        wide = here.flatten(2)
        torch.baddbmm(wide, up.expand(len(low), *up.shape), low.flatten(2), alpha=scale, out=wide)
    else:
        wide = here.flatten(0, -2)
        torch.addmm(wide, low.flatten(0, -2), up.t(), alpha=scale, out=wide)
    return here


class _Lean:
    """What one of PEFT's layers becomes: in bf16 it computes as the module says, else as PEFT's own."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See PEFT's layer."""
        names = kwargs.get("adapter_names")
        if names is not None:
            chosen = [name for name in dict.fromkeys(names) if name in self.lora_A]
        else:
            chosen = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        if not _fused(self, x, chosen) or (names is None and len(chosen) != 1):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        kwargs.pop("adapter_names", None)
        if names is not None:
            return self._rows(self.base_layer(x, *args, **kwargs), x, names)
        (name,) = chosen
        down, up, scale = self.lora_A[name], self.lora_B[name], self.scaling[name]
        if isinstance(down, nn.Linear):
            x, low = _Down.apply(x, down.weight)
            return _Up.apply(self.base_layer(x, *args, **kwargs), low, up.weight, scale, False)
        return _Up.apply(self.base_layer(x, *args, **kwargs), down(x), up.weight, scale, True)

    def _rows(self: Any, out: Tensor, x: Tensor, names: list[str]) -> Tensor:
        """Each row of a batch by its own adapter, without gradients."""
        out, begin = out.contiguous(), 0
        for name, group in groupby(names):
            end = begin + len(list(group))
            if name in self.lora_A:
                down, up = self.lora_A[name], self.lora_B[name].weight.to(out.dtype)
                _added(out[begin:end], down(x[begin:end]), up, self.scaling[name], not isinstance(down, nn.Linear))
            begin = end
        return out


def _fused(layer: Any, x: Tensor, names: list[str]) -> bool:
    if x.dtype != torch.bfloat16 or not names or layer.merged:
        return False
    kind = x.device.type
    known = torch.amp.is_autocast_available(kind)
    if known and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype:
        return False
    return all(isinstance(layer.lora_dropout[name], nn.Identity) and name not in layer.lora_variant for name in names)


_lean: dict[type, type] = {}


def use_input_precision(layer: Any, name: str) -> None:
    """Let one adapter of a PEFT layer multiply in its input's precision, in place.

    PEFT would take the input up to the weights' fp32 and keep that copy for backward: q, k and v, which get one tensor,
    three of them, and fp32 products where a card is several times faster in bf16. RuntimeError for layers of a kind
    that has no counterpart here.
    """
    for part in (layer.lora_A[name], layer.lora_B[name]):
        # PEFT makes convolutions of the adapted layer's own class, which in ComfyUI stands below torch's.
        kind = next((kind for kind in KINDS if isinstance(part, kind)), None)
        if kind is None or part.bias is not None or getattr(part, "padding_mode", "zeros") != "zeros":
            raise RuntimeError(f"this version of peft makes adapters of {part}: install peft 0.21")
        part.__class__ = KINDS[kind]
    layer.cast_input_dtype_enabled = False
    if not isinstance(layer, _Lean):
        own = type(layer)
        if own not in _lean:
            _lean[own] = type(own.__name__, (_Lean, own), {})
        layer.__class__ = _lean[own]
