"""What the count of kept memory sees, and that it keeps nothing itself."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retort.trainers import checkpointing, memory

# Operations that keep their own output for backward, and one that does not.
OPERATIONS = {
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "group_norm": lambda x: F.group_norm(x, 2),
    "rms_norm": lambda x: F.rms_norm(x, (8,)),
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "product": lambda x: x * x.tanh(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_counting_what_is_kept_keeps_nothing(name):
    """A hook that gives the tensor back makes a cycle of an output that its own node keeps: nothing ever ends it."""
    weight = nn.Parameter(torch.ones(8))
    held = weakref.ref(weight)
    x = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    with (saved := memory.SavedBytes(nn.Linear(2, 2))):
        out = OPERATIONS[name](x * weight)
    ends = weakref.ref(out)
    assert saved.count >= x.numel() * 4
    del out, weight
    assert held() is None and ends() is None


class Scaled(torch.Tensor):
    """A tensor of numbers and a scale, as quantised weights are: it has no storage of its own."""

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor):
        return Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)

    def __init__(self, numbers: Tensor, scale: Tensor):
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self):
        """What it consists of, by torch's protocol."""
        return ["numbers", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        raise NotImplementedError(function)


class Product(torch.autograd.Function):
    """A product with a quantised weight that keeps the weight as it is stored."""

    @staticmethod
    def forward(ctx, x, weight):
        """x (B, n), weight (m, n)."""
        ctx.save_for_backward(x, weight)
        return x @ (weight.numbers.float() * weight.scale).T

    @staticmethod
    def backward(ctx, gradient):
        """With respect to x alone."""
        raise NotImplementedError


def test_a_quantised_weight_is_counted_by_its_parts_and_no_activation():
    network = nn.Module()
    network.weight = nn.Parameter(Scaled(torch.ones(4, 6, dtype=torch.int8), torch.ones(4, 1)), requires_grad=False)
    assert memory.weights(network) == 4 * 6 + 4 * 4
    x, other = torch.zeros(2, 6, requires_grad=True), Scaled(torch.ones(4, 6, dtype=torch.int8), torch.ones(4, 1))
    with (saved := memory.SavedBytes(network)):
        Product.apply(x, network.weight)
        assert saved.count == 2 * 6 * 4
        Product.apply(x, other)
    assert saved.count == 2 * 6 * 4 + 4 * 6 + 4 * 4


class Block(nn.Module):
    """Reads most of what it needs by keyword."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, text=None, options=None):
        """x and text (B, 4)."""
        return self.second(self.first(x).tanh() * text) + options["add"]


class Network(nn.Module):
    """Blocks in a list."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x, text):
        """x and text (B, 4)."""
        for block in self.blocks:
            text = text + 1
            x = block(x, text=text, options={"add": 1.0})
        return x


def test_what_a_block_is_given_by_keyword_is_counted():
    network = Network()
    checkpointing.enable(network)
    x, text = torch.zeros(2, 4, requires_grad=True), torch.ones(2, 4)
    with (saved := memory.SavedBytes(network)):
        network(x, text)
    checkpointing.disable(network)
    assert saved.count >= 3 * 2 * x.numel() * 4
