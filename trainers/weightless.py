"""Networks without memory: the same modules on torch's "meta" device, where tensors have shapes and no numbers.

Every operation runs, autograd, checkpoints and hooks included, but computes nothing. The meta device stands for the
accelerator, so that what is moved to the CPU leaves it, as it would.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

META = torch.device("meta")
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# Since torch 2.9 CUDA's kernel keeps its input and a number for each row; elsewhere the norm is taken apart.
_FUSED_NORM = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)


def weightless(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the same shape and type without numbers; a quantised one keeps its parts, each of as many bytes."""
    if is_traceable_wrapper_subclass(tensor):
        names, context = tensor.__tensor_flatten__()
        parts = {name: weightless(getattr(tensor, name)) for name in names}
        return type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=META)


def bare(network: nn.Module) -> bool:
    """Whether a network's weights have no numbers."""
    return all(weight.is_meta for weight in network.parameters())


def weightless_copy(
    network: nn.Module,
    cast: Callable[[Tensor], torch.dtype | None] = lambda _: None,
    without: Collection[nn.Module] = (),
) -> nn.Module:
    """The same modules with weights that have no numbers.

    cast: the type to give a weight, None for its own. without: entries of the network's lists to leave out.
    """
    known: dict[int, Any] = {id(module): None for module in without}
    for weight in network.parameters():
        known[id(weight)] = nn.Parameter(weightless(weight.detach(), cast(weight)), requires_grad=False)
    for buffer in network.buffers():
        known.setdefault(id(buffer), weightless(buffer, cast(buffer)))
    made = copy.deepcopy(network, known)
    if without:
        for part in made.modules():
            if isinstance(part, nn.ModuleList):
                part._modules = {str(i): m for i, m in enumerate(m for m in part._modules.values() if m is not None)}
    return made


class _Norm(torch.autograd.Function):
    """RMSNorm that keeps what CUDA's kernel keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, rows: tuple[int, ...]) -> Tensor:
        scale = x.new_empty(rows, dtype=torch.float32)
        ctx.save_for_backward(x, weight, scale)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None, None


@contextmanager
def as_on_the_card() -> Iterator[None]:
    """Within it what torch takes apart on the meta device keeps for backward what CUDA's kernels keep.

    Attention: queries, keys, values, output and a number for each row, not the score matrix.
    """
    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", _attention, "AutogradMeta")
    if _FUSED_NORM:
        library.impl("rms_norm", _norm, "AutogradMeta")
    try:
        yield
    finally:
        del library


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (part.repeat_interleave(groups, -3) for part in (key, value))
    whole = query.ndim == 4
    if not whole:
        query, key, value = (part.unflatten(0, (-1, 1)) for part in (query, key, value))
    if attn_mask is not None:
        # The kernel takes numbers to be added.
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype) if attn_mask.dtype != query.dtype else attn_mask
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + attn_mask.shape)
    out = _flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return out if whole else out.flatten(0, 1)


def _norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return _Norm.apply(input, weight, input.shape[: -len(normalized_shape)])
