"""Block inputs, gradients and optimisers' states on their way to host memory and back: no race, no bit changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from retort.trainers import checkpointing, optimisers, players
from retort.trainers.host_inputs import HostInputs
from retort.trainers.objectives.parts.contract import Player
from retort.trainers.players import Runner

HERE = torch.device("second")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x, positions=None):
        return x + self.down((self.up(x) + positions).tanh())


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x):
        positions = torch.linspace(-1, 1, x.numel(), device=x.device).view_as(x)
        for block in self.blocks:
            x = block(x, positions=positions)
        return x


X = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(1))


def gradients(network, host=None):
    network.zero_grad(set_to_none=True)
    x = X.to(next(network.parameters()).device)
    if host is None:
        out = network(x)
    else:
        with host.watching():
            out = network(x)
    del x
    torch.accelerator.synchronize()  # what a copy still reads is not free yet
    before = torch.accelerator.memory_allocated()
    out.square().sum().backward()
    return [p.grad.cpu() for p in network.parameters()], before


def test_inputs_come_back_to_the_bit_and_in_time(second):
    network = Network().to(HERE)
    checkpointing.enable(network)
    (plain, kept), host = gradients(network), HostInputs(HERE, least=X.numel() * 4)
    for _ in range(2):
        again, left = gradients(network, host)
        assert all(torch.equal(one, other) for one, other in zip(again, plain, strict=True))
    # Six inputs and the positions have left, but for what is still in use.
    assert host.moved >= 2 * 6 * X.numel() * 4
    assert kept - left >= 4 * X.numel() * 4


@pytest.mark.parametrize("name", ["adamw", "adafactor", "prodigy"])
def test_players_whose_state_waits_in_host_memory_move_alike(second, monkeypatch, name):
    if name == "prodigy":
        pytest.importorskip("prodigyopt")
    monkeypatch.setattr(players, "LEAST", 2)
    found = []
    for in_host in (False, True):
        moved = []
        networks = {who: Network().to(HERE) for who in ("student", "fake")}
        runners = {}
        for who, network in networks.items():
            weights = dict(network.named_parameters())
            rate = 1.0 if name == "prodigy" else 1e-2
            made = optimisers.make(name, list(weights.values()), rate, (0.9, 0.99), 0.01)
            runners[who] = Runner(who, Player(who), weights, made, in_host)
        for step in range(3):
            for _ in range(2):
                for who, runner in runners.items():
                    with runner.turn():
                        ((networks[who](X.to(HERE)) - step) ** 2).mean().backward()
                    if in_host:
                        assert all(weight.grad is None for weight in runner.weights.values())
            for runner in runners.values():
                runner.clip(1.0)
            for runner in runners.values():
                runner.move(1.0 if name == "prodigy" else 1e-2)
            if in_host:
                states = [value for entries in runners["fake"].optimiser.state.values() for value in entries.values()]
                assert all(v.device.type == "cpu" for v in states if isinstance(v, torch.Tensor) and v.numel() > 1)
        for runner in runners.values():
            moved += [value.cpu().clone() for values in runner.saved().values() for value in values.values()]
        found.append(copy.deepcopy([value.detach() for value in moved]))
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
