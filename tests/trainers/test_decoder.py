"""A decoder's gradient with its blocks forgotten: the same to the bit, for a part of the memory."""

from __future__ import annotations

import pytest
import saved
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retort.trainers.decoder import Decoder, blocks


class Residual(nn.Module):
    """Norm, activation and convolution, twice."""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.first = nn.GroupNorm(2, width), nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, edges: list | None = None) -> Tensor:
        """x (B, C, h, w); edges: what the blocks of the piece before left for those of this one."""
        if edges is not None:
            x = x + edges.pop(0)
            edges.append(x.mean())
        return x + self.second(F.silu(self.first(F.silu(self.norm(x)))))


class Enlarge(nn.Module):
    """Twice as large, then a convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0))


class Network(nn.Module):
    """Levels that only hold their parts, as Stable Diffusion's decoder has them."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(4, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.up = nn.ModuleList()
        for _ in range(2):
            level = nn.Module()
            level.block = nn.ModuleList([Residual(width), Residual(width)])
            level.enlarge = Enlarge(width)
            self.up.append(level)

    def decode(self, z: Tensor) -> Tensor:
        """(B, 4, h, w) -> (B, 3, 4h, 4w), in two pieces that share their edges."""
        out, edges = [], [z.new_zeros(()) for _ in range(4)]
        for piece in z.chunk(2, 2):
            x = self.enter(piece)
            for level in self.up:
                for block in level.block:
                    x = block(x, edges=edges)
                x = level.enlarge(x)
            out.append(self.leave(x))
        return torch.cat(out, 2)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Network().requires_grad_(False)


def gradient(decode, z):
    z = z.clone().requires_grad_()
    decode(z).square().sum().backward()
    return z.grad


def test_the_gradient_is_the_same_to_the_bit_and_less_is_kept(network):
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    decoder = Decoder(network, network.decode)
    assert torch.equal(gradient(decoder, z), gradient(network.decode, z))
    assert torch.equal(decoder(z), network.decode(z))
    assert not [module for module in network.modules() if "forward" in vars(module)]
    counts = []
    for decode in (network.decode, decoder):
        with (kept := saved.SavedBytes(network)):
            decode(z.clone().requires_grad_())
        counts.append(kept.count)
    assert 0 < counts[1] < 0.4 * counts[0]


def test_blocks_are_the_smallest_parts_that_run(network):
    assert [name for name, _ in blocks(network)] == [
        "up.0.block.0", "up.0.block.1", "up.0.enlarge", "up.1.block.0", "up.1.block.1", "up.1.enlarge",
    ]  # fmt: skip
    network.up[0].block[0].notes = {}  # it remembers its last call
    assert [name for name, _ in blocks(network)][0] == "up.0.block.1"


def test_a_second_backward_pass_sees_the_same_edges(network):
    """What a block changes in a list is as it was when the block is computed again, however often."""
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    out = Decoder(network, network.decode)(z).square().sum()
    first, second = (torch.autograd.grad(out, z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(first, gradient(network.decode, z.detach()))
