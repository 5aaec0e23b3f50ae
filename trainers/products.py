"""LoRA products in the precision of what comes in, while the weights that learn and their gradients stay in fp32."""

from __future__ import annotations

from collections.abc import Callable
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
