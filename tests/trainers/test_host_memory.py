"""What waits in host memory - block inputs, gradients and optimisers' states - and comes back to the bit."""

from __future__ import annotations

import gc
import importlib.util
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from retort.trainers import checkpointing, players, state
from retort.trainers.adapters import LoraConfig
from retort.trainers.host_inputs import LEAST, HostInputs
from retort.trainers.loop import Stopped
from retort.trainers.objectives.contract import Batch, Draws
from retort.trainers.objectives.tdm import TDM, TDMConfig

_spec = importlib.util.spec_from_file_location("retort_test_loop", Path(__file__).with_name("test_loop.py"))
loop = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(loop)
make, same, Stop = loop.make, loop.same, loop.Stop
CPU = torch.device("cpu")


class Block(nn.Module):
    """Given positions by keyword, which all blocks share."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x, positions=None):
        return x + self.second((self.first(x) + positions).tanh())


class Network(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(6)).to(dtype)

    def forward(self, x):
        positions = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
        for block in self.blocks:
            x = block(x, positions=positions)
        return x


def gradients(network, x, host=None):
    network.zero_grad(set_to_none=True)
    if host is None:
        out = network(x)
    else:
        with host.watching():
            out = network(x)
    (out.float() ** 2).sum().backward()
    return [p.grad for p in network.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_inputs_come_back_to_the_bit(dtype, checkpointed):
    network = Network(dtype)
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    if checkpointed:
        checkpointing.enable(network)
    plain = [g.clone() for g in gradients(network, x)]
    host = HostInputs(CPU, least=x.numel() * x.element_size())
    for again, first in zip(gradients(network, x, host), plain, strict=True):
        assert torch.equal(again, first)
    if checkpointed:
        # Six inputs, the positions that they share once, and what the loss's own cast keeps.
        size = x.numel() * x.element_size()
        assert 7 * size <= host.moved <= 8 * size


def test_small_inputs_stay():
    network = Network(torch.float32)
    checkpointing.enable(network)
    host = HostInputs(CPU)
    gradients(network, torch.ones(2, 16, 32), host)
    assert host.moved == 0 and LEAST == 16 * 2**20


def test_what_is_moved_is_not_kept_where_it_was():
    """The inputs themselves are gone after the forward pass, and everything is after the backward pass."""
    network = Network(torch.float32)
    checkpointing.enable(network)
    inputs = []
    for block in network.blocks:
        block.register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0])))
    host = HostInputs(CPU, least=1)
    with host.watching():
        out = network(torch.ones(2, 16, 32))
    gc.collect()
    assert [ref() is None for ref in inputs] == [True] * 6
    out.sum().backward()
    held = weakref.ref(out)
    del out
    gc.collect()
    assert held() is None


def test_a_tensor_that_is_written_to_is_found_out():
    x = torch.ones(4, requires_grad=True)
    with HostInputs(CPU).watching():
        y = x.exp()
        z = y.sin()
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        z.sum().backward()
    # What has gone to host memory is as it was.
    with HostInputs(CPU, least=1).watching():
        y = x.detach().exp().requires_grad_() * 1
        z = y.sin()
    expected = y.detach().cos()
    kept = y.detach()
    kept.add_(1)
    (slope,) = torch.autograd.grad(z.sum(), y)
    assert torch.equal(slope, expected)


def test_two_graphs_wait_at_once(tiny):
    found = []
    for host in (None, HostInputs(CPU, least=1)):
        denoiser = tiny()
        predict = denoiser.predict_x0
        if host is not None:

            def watched(x, sigma, cond, predict=predict, host=host):
                with host.watching():
                    return predict(x, sigma, cond)

            denoiser.predict_x0 = watched
        checkpointing.enable(denoiser.network)
        objective = TDM(TDMConfig(), denoiser)
        batch = Batch(Draws(4, 0, (0, 1)), (3, 4, 4), {"mean": torch.tensor([0.2, 0.5])}, {"mean": torch.zeros(2)})
        for loss in objective.losses(batch, 0):
            with denoiser.adapter(loss.player):
                loss.value.backward()
        found.append([w.grad for p in objective.players for w in denoiser.adapters.parameters(p).values()])
    assert host.moved > 0
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# ---- runs --------------------------------------------------------------------------------------------


def started(make, name, watcher=None, **options):
    trainer = make(name, watcher, **options) if watcher else make(name, **options)
    trainer.host_state = trainer.host_inputs = True
    return trainer


@pytest.mark.parametrize("optimiser", ["adamw", "adafactor", "prodigy", "adamw8bit"])
def test_a_run_with_its_state_in_host_memory_is_the_same(make, monkeypatch, optimiser):
    package = {"adafactor": "transformers", "prodigy": "prodigyopt", "adamw8bit": "bitsandbytes"}.get(
        optimiser, "torch"
    )
    pytest.importorskip(package)
    rate = 1.0 if optimiser == "prodigy" else 1e-3
    options = {"optimiser": optimiser, "learning_rate": rate, "accumulation": 2, "batch_size": 2, "ema": 0.9}
    whole = make("whole", lora=LoraConfig(rank=1), **options).train()
    trainer = started(make, "host", lora=LoraConfig(rank=1), **options)
    same(trainer.train(), whole)
    assert all(runner.in_host for runner in trainer.runners.values()) and trainer.denoiser.host_inputs is None
    with pytest.raises(Stopped):
        started(make, "split", Stop(5), lora=LoraConfig(rank=1), **options).train()
    same(started(make, "split", lora=LoraConfig(rank=1), **options).train(), whole)


def test_between_turns_nothing_of_a_player_is_where_its_weights_are(make, monkeypatch):
    monkeypatch.setattr(players, "LEAST", 2)
    moved = []
    there = players._there
    monkeypatch.setattr(players, "_there", lambda tensor, device: (moved.append(device), there(tensor, device))[1])
    trainer = started(make, "run", lora=LoraConfig(rank=1))
    trainer.train()
    assert moved
    runner = trainer.runners["student"]
    weight = next(iter(runner.weights.values()))
    before = {k: v.data_ptr() for k, v in state.optimiser_tensors(runner.optimiser, list(runner.weights)).items()}
    with runner.turn():
        weight.grad = torch.full_like(weight, 2.0)
    assert weight.grad is None
    with runner.turn():
        assert bool((weight.grad == 2).all())
        weight.grad += 1
    with runner.turn():
        assert bool((weight.grad == 3).all())
    runner.forget_gradients()
    with runner.turn():
        assert weight.grad is None
    after = {k: v.data_ptr() for k, v in state.optimiser_tensors(runner.optimiser, list(runner.weights)).items()}
    assert before == after
