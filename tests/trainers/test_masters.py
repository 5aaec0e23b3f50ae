"""Streamed weights in host memory: where they lie, which of them move, and what stands in their places."""

from __future__ import annotations

import copy

import pytest
import streamed
import torch
from torch import Tensor, nn

from retort.trainers import checkpointing, masters
from retort.trainers.masters import Away
from retort.trainers.streaming import Ring

Network, start = streamed.Network, streamed.start
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Biases are gathered, other weights stay where they lie."""
    monkeypatch.setattr(masters, "SMALL", 100)


def test_a_weight_that_is_away_refuses_to_be_read():
    made = Network()
    before = copy.deepcopy(made.state_dict())
    ring = Ring(made, CPU, 6)
    weight = made.late[0].first.weight
    assert isinstance(weight, nn.Parameter) and weight.shape == (12, 8) and weight.dtype == torch.float32
    assert not weight.requires_grad and "late.0.first.weight" in repr(weight)
    ways = (
        lambda: weight + 1, lambda: weight.sum(), lambda: nn.functional.linear(start(), weight), lambda: weight[0],
        lambda: weight.to("cpu"), lambda: weight.detach(), lambda: torch.cat([torch.ones(12, 8), weight]),
        lambda: weight.data, lambda: weight.untyped_storage(), lambda: weight.data_ptr(), lambda: weight.tolist(),
        lambda: weight.copy_(torch.ones(12, 8)), lambda: torch.ones(12, 8).copy_(weight), made.state_dict,
        lambda: copy.deepcopy(made), lambda: made.late.to(torch.bfloat16),
    )  # fmt: skip
    for way in ways:
        with pytest.raises(RuntimeError, match=r"(early|late)\.0\.first\.weight.*streamed"):
            way()
    ring.close()
    for name, value in made.state_dict().items():
        assert value.equal(before[name]), name


def test_pinned_memory_is_given_back():
    pinned: list[int] = []

    def pin(tensor: Tensor) -> bool:
        if len(pinned) == 8:
            return False  # no more is allowed
        pinned.append(tensor.data_ptr())
        return True

    made = Network()
    weight = made.early[0].first.weight.data_ptr()
    ring = Ring(made, CPU, 4, pin=pin, unpin=lambda tensor: pinned.remove(tensor.data_ptr()))
    # Two matrices of a block where they lie, and one buffer of what is small: two blocks, and none in part.
    assert len(pinned) == 6 and [block.master.pinned for block in ring.blocks] == [True, True, False, False]
    assert weight not in pinned
    ring.stream(0)
    assert not pinned and made.early[0].first.weight.data_ptr() == weight
    ring.stream(4)
    assert len(pinned) == 6
    ring.close()
    assert not pinned


def test_weights_in_host_memory_stay_where_they_lie():
    """Another network may share them, or a file hold them; a second copy would double the base."""
    made = Network()
    before = {name: (p, p.data_ptr()) for name, p in made.named_parameters()}
    ring = Ring(made, CPU, 4)
    checkpointing.enable(made)
    with torch.no_grad():
        made(start())
    assert made.early[0].first.weight is not before["early.0.first.weight"][0]
    ring.close()
    assert all(p is before[name][0] and p.data_ptr() == before[name][1] for name, p in made.named_parameters())


def test_shared_weights_and_those_of_unknown_classes_stay():
    class Unknown(torch.Tensor):
        """A class that does not say what it consists of."""

    made = Network()
    made.early[1].first = made.early[0].first  # in two blocks
    made.late[0].again = made.late[0].norm  # twice in one
    made.late[1].first.weight = nn.Parameter(torch.ones(12, 8).as_subclass(Unknown), requires_grad=False)
    made.requires_grad_(False)
    x = start()
    before = made(x)
    ring = Ring(made, CPU, 6)
    checkpointing.enable(made)
    assert not isinstance(made.early[0].first.weight, Away) and isinstance(made.early[0].second.weight, Away)
    assert made.late[0].again.weight is made.late[0].norm.weight and isinstance(made.late[0].norm.weight, Away)
    assert isinstance(made.late[1].first.weight, Unknown)
    assert made(x).equal(before)
    ring.close()
    assert made.late[0].again.weight is made.late[0].norm.weight


def test_strides_of_a_weight_are_kept():
    made = nn.ModuleDict({"blocks": nn.ModuleList([nn.Module()])})
    made["blocks"][0].conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    made["blocks"][0].wide = nn.Linear(4, 4)
    made["blocks"][0].wide.weight = nn.Parameter(torch.rand(4, 8)[:, ::2])
    made.requires_grad_(False)
    kept = [made["blocks"][0].conv.weight.clone(), made["blocks"][0].wide.weight.clone()]
    ring = Ring(made, CPU, 1)
    ring.enter(0)
    conv, wide = made["blocks"][0].conv.weight, made["blocks"][0].wide.weight
    assert conv.stride() == kept[0].stride() == (36, 1, 12, 4) and conv.equal(kept[0]) and wide.equal(kept[1])
