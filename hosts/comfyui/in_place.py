"""Flux's blocks add to their inputs in place, which backward refuses where adapters give those inputs a gradient.

A norm keeps its input for the backward pass, and the block adds to it afterwards; a checkpoint runs a block again on
the inputs that it holds, and those the block has changed. Both were seen to end in torch's error about in-place
operations. Copies mend both, in our own copy of the network alone.
"""

from __future__ import annotations

import torch
from comfy.ldm.flux.layers import DoubleStreamBlock, SingleStreamBlock
from torch import Tensor, nn

_ADDED_TO = ("img", "txt", "x")


def _copied(value):
    return value.clone() if isinstance(value, Tensor) and torch.is_grad_enabled() else value


class _Double(DoubleStreamBlock):
    def forward(self, *args, **kwargs):
        """The block on copies; img and txt come first, by place or by name."""
        named = {k: _copied(v) if k in _ADDED_TO else v for k, v in kwargs.items()}
        return super().forward(*map(_copied, args[:2]), *args[2:], **named)


class _Single(SingleStreamBlock):
    def forward(self, *args, **kwargs):
        """The block on a copy of x, by place or by name."""
        named = {k: _copied(v) if k in _ADDED_TO else v for k, v in kwargs.items()}
        return super().forward(*map(_copied, args[:1]), *args[1:], **named)


_KEEPING: dict[type, type[nn.Module]] = {DoubleStreamBlock: _Double, SingleStreamBlock: _Single}


def keep_inputs(network: nn.Module) -> None:
    """Make Flux's blocks, also in models built from them, leave alone what backward needs."""
    for block in network.modules():
        kind = _KEEPING.get(type(block))
        if kind is None:
            continue
        # A class and not an attribute: gradient checkpointing replaces `forward` on the instance, and puts it back.
        block.__class__ = kind
        for child in block.children():
            if isinstance(child, nn.LayerNorm):
                child.register_forward_pre_hook(lambda _, args: (_copied(args[0]), *args[1:]))
