"""Gradient checkpointing on blocks that are told things through a shared dictionary, as ComfyUI's are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from retort.trainers import checkpointing


class Block(nn.Module):
    """Does what its number says; notes it in the dictionary that all blocks share."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, options, more=None):
        """x (B, 4)."""
        return x + self.second((self.first(x) * (1 + options["block"] + more["block"])).tanh())


class Network(nn.Module):
    """Blocks in a list, told their number on the way."""

    def __init__(self, count=3):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(count))

    def forward(self, x):
        """x (B, 4)."""
        options = {}
        for number, block in enumerate(self.blocks):
            options["block"] = number
            x = block(x, options, more=options)
        return x


def gradients(network):
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    network.zero_grad()
    network(x).square().sum().backward()
    return [p.grad.clone() for p in network.parameters()]


def test_a_block_is_run_again_with_what_it_was_told():
    """ComfyUI's UNet writes each block's place into one dictionary; in backward it would hold the last one's."""
    network = Network()
    plain = gradients(network)
    assert checkpointing.enable(network) == 3
    for again, first in zip(gradients(network), plain, strict=True):
        torch.testing.assert_close(again, first, rtol=0, atol=0)
    checkpointing.disable(network)
    assert all("forward" not in vars(block) for block in network.blocks)


def test_blocks_are_the_first_modules_inside_lists():
    network = nn.ModuleDict({
        "enter": nn.Linear(4, 4),
        "input_blocks": nn.ModuleList([nn.Sequential(Block(), nn.Linear(4, 4)), nn.Sequential(Block(), Block())]),
        "deep": nn.ModuleDict({"blocks": nn.ModuleList([Block()])}),
    })  # fmt: skip
    names = [name for name, _ in checkpointing.blocks(network)]
    assert names == ["input_blocks.0.0", "input_blocks.1.0", "input_blocks.1.1", "deep.blocks.0"]


class Spatial(nn.Module):
    """As SDXL's blocks of attention: transformer blocks in a list, between two layers of its own."""

    def __init__(self, depth: int):
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(4, 4), nn.Linear(4, 4)
        self.transformer_blocks = nn.ModuleList(Block() for _ in range(depth))


def test_what_is_checkpointed_are_the_smallest_blocks_that_hold_most_of_a_blocks_weights():
    network = nn.ModuleDict({
        "input_blocks": nn.ModuleList([nn.Sequential(Block(), Spatial(4)), nn.Sequential(Block(), Spatial(2))]),
    })  # fmt: skip
    outer = ["input_blocks.0.0", "input_blocks.0.1", "input_blocks.1.0", "input_blocks.1.1"]
    assert [name for name, _ in checkpointing.blocks(network)] == outer  # where a discriminator looks
    names = [name for name, _ in checkpointing.units(network)]
    # Two inner blocks of two layers beside two layers hold but two thirds.
    assert names == [outer[0], *(f"{outer[1]}.transformer_blocks.{i}" for i in range(4)), *outer[2:]]


def test_what_precedes_a_block_is_inside_its_checkpoint_and_goes_alone():
    network, entered = Network(2), []
    plain = gradients(network)
    for number, block in enumerate(network.blocks):
        checkpointing.precede(block, lambda number=number: entered.append(number))
    checkpointing.enable(network)
    with pytest.raises(RuntimeError, match="before `enable`"):
        checkpointing.precede(network.blocks[0], list)
    for again, first in zip(gradients(network), plain, strict=True):
        torch.testing.assert_close(again, first, rtol=0, atol=0)
    assert entered == [0, 1, 1, 0]
    checkpointing.unprecede(network.blocks[0])
    checkpointing.disable(network)
    assert "forward" not in vars(network.blocks[0]) and not checkpointing.checkpointed(network.blocks[1])
    gradients(network)
    assert entered == [0, 1, 1, 0, 1]
    checkpointing.unprecede(network.blocks[1])
    assert "forward" not in vars(network.blocks[1])


class Quantised(nn.Module):
    """A linear layer that torch would not call one, as ComfyUI's with quantised weights."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.float8_e4m3fn), requires_grad=False)


def test_blocks_of_quantised_layers_are_blocks():
    network = Network()
    for block in network.blocks:
        block.first, block.second = Quantised(), Quantised()
    assert len(checkpointing.blocks(network)) == 3


@pytest.mark.parametrize("frozen", [True, False])
def test_nothing_is_kept_where_no_gradient_passes(frozen):
    network = Network().requires_grad_(not frozen)
    checkpointing.enable(network)
    assert network(torch.ones(1, 4)).requires_grad is not frozen


class Cache:
    """What a network computes once for all its blocks, as SeedVR2's positions."""

    def __init__(self):
        self.kept = {}

    def __call__(self, key, compute):
        """The value of a key."""
        if key not in self.kept:
            self.kept[key] = compute()
        return self.kept[key]


def test_a_cache_that_blocks_fill_is_as_it_was_when_they_are_run_again():
    """The first block computes what the others find; run again, it has to compute it once more."""
    network = Network()

    def run(x):
        cache = Cache()
        for block in network.blocks:
            x = block(x, cache)
        return x

    class Filling(Block):
        def forward(self, x, cache):
            angle = cache("angle", lambda: x.detach().sin() * self.first(x).cos())
            return super().forward(x * angle, {"block": 1}, {"block": 1})

    for block in network.blocks:
        block.__class__ = Filling
    network.forward = run
    plain = gradients(network)
    checkpointing.enable(network)
    assert all(torch.equal(again, first) for again, first in zip(gradients(network), plain, strict=True))
