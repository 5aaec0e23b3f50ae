"""Blocks that write in place are differentiated exactly, and what cannot be differentiated is named before a step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from retort.trainers import checkpointing
from retort.trainers.rehearsal import rehearse
from retort.trainers.writes import NoWrites, forbid

WIDTH = 6


class Plain(nn.Module):
    """A block of a norm, attention and an MLP, without a write."""

    def __init__(self):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, scale):
        """x (B, N, WIDTH), scale (B, 1, WIDTH)."""
        x = x + self.first(self.norm(x)) * scale
        y = nn.functional.layer_norm(x, (WIDTH,))
        y = y + y * scale
        x = x + self.second(y)
        return torch.cat([x[:, :2] + y[:, :2] * scale, x[:, 2:]], 1)


class InPlace(Plain):
    """The same, as blocks are written for sampling: to its input, to a norm's output, to a slice, to `out`."""

    def forward(self, x, scale):
        """See the base."""
        x += self.first(self.norm(x)) * scale
        y = nn.functional.layer_norm(x, (WIDTH,))
        y.addcmul_(y, scale)
        x = torch.add(x, self.second(y), out=x)
        x[:, :2].addcmul_(y[:, :2], scale)
        return x


class Network(nn.Module):
    """Blocks in a list behind a layer, so that their inputs carry gradients."""

    def __init__(self, kind, count=2):
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(kind() for _ in range(count))
        self.double()

    def forward(self, x):
        """x (B, N, WIDTH)."""
        scale = self.enter(x.mean(1, keepdim=True))
        x = self.enter(x)
        for block in self.blocks:
            x = block(x, scale)
        return x


def given():
    return torch.randn(3, 4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(network):
    network.zero_grad()
    out = network(given())
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]


def same(found, expected):
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("checkpoints", [False, True])
def test_blocks_that_write_have_the_gradient_of_those_that_do_not(checkpoints):
    """With checkpoints it was another gradient before, and nothing said so."""
    expected, network = gradients(Network(Plain)), Network(InPlace)
    if checkpoints:
        checkpointing.enable(network)
    rehearse(network, lambda: network(given()))
    same(gradients(network), expected)
    assert all(type(block) is not InPlace and isinstance(block, InPlace) for block in network.blocks)


def test_what_a_checkpoint_keeps_is_not_checked_by_torch():
    """Why blocks that write may not be left to torch's own check: a write after a norm, in a checkpoint."""

    class Once(Plain):
        def forward(self, x, scale):
            y = torch.sigmoid(self.first(x))
            z = y * scale
            return self.second(y.mul_(2) + z)

    network = Network(Once)
    checkpointing.enable(network)
    wrong = gradients(network)
    network = Network(Once)
    rehearse(network, lambda: network(given()))
    right = gradients(network)
    assert torch.equal(wrong[0], right[0])
    assert not all(torch.allclose(a, b) for a, b in zip(wrong[1:], right[1:], strict=True))


def test_blocks_that_do_not_write_stay_what_they_are():
    network = Network(Plain)
    rehearse(network, lambda: network(given()))
    assert all(type(block) is Plain and "forward" not in vars(block) for block in network.blocks)


def test_without_gradients_a_block_writes_as_before():
    network = Network(InPlace)
    with torch.no_grad():
        expected = network(given())
        for block in network.blocks:
            forbid(block)
        assert torch.equal(network(given()), expected)
        x = given()
        network.blocks[0](x, x[:, :1].clone())
        assert not torch.equal(x, given())


def test_views_and_names_of_a_tensor_see_what_was_written():
    x = given().requires_grad_() * 1
    with NoWrites() as mode:
        rows, same_tensor, kept = x[:, 1:3], x, x.sin()
        x += 1
        rows.mul_(2)
        x[:, 0] = 0.0
        found = torch.stack([same_tensor.sum(), rows.sum(), mode.now(x).sum()])
    reference = given()
    reference += 1
    reference[:, 1:3].mul_(2)
    reference[:, 0] = 0.0
    assert torch.allclose(found, torch.stack([reference.sum(), reference[:, 1:3].sum(), reference.sum()]))
    torch.autograd.grad((found.sum() + kept.sum()), x)  # nothing that was kept has changed


@torch.library.custom_op("retort_tests::halved", mutates_args=())
def halved(x: torch.Tensor) -> torch.Tensor:
    """An operator without a backward pass."""
    return x / 2


def test_an_operator_without_a_backward_pass_is_named():
    class Fused(Plain):
        def forward(self, x, scale):
            return halved(super().forward(x, scale))

    network = Network(Fused)
    with pytest.raises(ValueError, match=r"no gradient passes Fused of Network \(its operator retort_tests.halved"):
        rehearse(network, lambda: network(given()))
    assert all("forward" not in vars(block) for block in network.blocks)


class TwoWays(Plain):
    """A block that its network calls by two methods of its own."""

    def forward_first(self, x, scale):
        """See the base."""
        return x + self.first(self.norm(x)) * scale

    def forward_second(self, x, scale):
        """See the base."""
        return self.forward_first(x, scale) + self.second(x)


class ByOtherNames(Network):
    """Calls its blocks by these."""

    def forward(self, x):
        """See the base."""
        scale = self.enter(x.mean(1, keepdim=True))
        x = self.enter(x)
        for block in self.blocks:
            x = block.forward_second(block.forward_first(x, scale), scale)
        return x


def test_blocks_are_checkpointed_by_whatever_method_they_are_called():
    network = ByOtherNames(TwoWays)
    expected, saved = gradients(network), []

    def count():
        saved.append(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(saved.pop() + 1), t)[1], lambda t: t):
            network(given())

    count()
    assert checkpointing.enable(network) == 2
    rehearse(network, lambda: network(given()))
    count()
    assert saved[1] < 0.7 * saved[0]
    assert all(torch.equal(a, b) for a, b in zip(gradients(network), expected, strict=True))
    checkpointing.disable(network)
    assert not any(name.startswith("forward") for block in network.blocks for name in vars(block))


def test_data_that_the_network_does_not_take_are_refused_in_a_sentence():
    network = Network(Plain)
    with pytest.raises(ValueError, match="model cannot be trained on these data: Network does not take .* mat1 and"):
        rehearse(network, lambda: network(given()[..., :2]))


def test_a_network_may_write_to_what_a_block_has_computed():
    class After(Network):
        def forward(self, x):
            scale = self.enter(x.mean(1, keepdim=True))
            for block in self.blocks:
                x = block(x, scale)
                x += 1
            return x

    network = After(Plain)
    rehearse(network, lambda: network(given()))
    assert all(type(block) is Plain for block in network.blocks)


def test_checkpoints_that_would_do_nothing_are_refused():
    class Unseen(Network):
        def forward(self, x):
            for block in self.blocks:
                x = x + block.second(block.first(self.enter(x)))
            return x

    network = Unseen(Plain)
    rehearse(network, lambda: network(given()))
    checkpointing.enable(network)
    with pytest.raises(ValueError, match="gradient_checkpointing: Unseen calls none of its 2 blocks"):
        rehearse(network, lambda: network(given()))
