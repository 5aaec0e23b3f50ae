"""Trainings with a streamed base on a card: to the bit as the CPU's, in time, and what they say of memory is true."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from dataclasses import replace

import pytest
import streamed
import torch

from retort.sampling.path import FLOW
from retort.trainers import checkpointing, masters, planning, transfers
from retort.trainers.adapters import LoraConfig
from retort.trainers.data import Data
from retort.trainers.loop import Trainer
from retort.trainers.methods import METHODS, read_config
from retort.trainers.objectives.parts.discriminator import Discriminator
from retort.trainers.streaming import Ring
from retort.trainers.watch import Silent

HERE, CPU = torch.device("second"), torch.device("cpu")


class Heard(Silent):
    """Keeps what it is told."""

    def __init__(self):
        self.said: list[str] = []
        self.numbers: list[dict[str, float]] = []

    def step(self, done, total, metrics):
        self.numbers.append(dict(metrics))

    def says(self, text):
        self.said.append(text)


@pytest.fixture
def trainer(tmp_path):
    """trainer(folder, count, ...) -> a Trainer whose network streams `count` of its four blocks to a device."""

    def make(folder, count, device=HERE, dtype=torch.float32, dropout=0.0, watcher=None, **training):
        denoiser = streamed.StreamedDenoiser(FLOW, dtype)
        denoiser.device = device
        truth = planning.Truth(device)
        denoiser.place(count)
        generator = torch.Generator().manual_seed(5)
        latents = list(torch.randn(6, 8, 2, 2, generator=generator))
        conds = [{"mean": torch.tensor([0.1 * i])} for i in range(6)]
        data = Data(conds, ["a"] * 6, {"mean": torch.zeros(1)}, latents)
        training = {
            "steps": 3, "batch_size": 2, "warmup": 0, "learning_rate": 0.01, "preview_every": 0, "save_minutes": 0,
            "gradient_checkpointing": True, **training,
        }  # fmt: skip
        config = read_config({"method": "flow", "objective": {}, "training": training, "lora": {"rank": 2}})
        config = replace(config, lora=LoraConfig(rank=2, dropout=dropout))
        objective = METHODS["flow"].objective(config.objective, denoiser)
        return Trainer(denoiser, objective, data, config, tmp_path / folder, watcher, truth=truth)

    return make


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert not a[name].isnan().any() and torch.equal(a[name].cpu(), b[name].cpu()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_streamed_run_is_the_cpus_to_the_bit(second, trainer, dtype, count):
    expected = trainer("cpu", 0, CPU, dtype).train()
    run = trainer("here", count, HERE, dtype)
    same(run.train(), expected)
    assert run.denoiser.ring.count == count
    run.denoiser.end_streaming()


def test_the_peak_is_the_runs_own(second, trainer):
    torch.empty(1 << 26, device=HERE)  # before the run
    heard = Heard()
    run = trainer("run", 2, watcher=heard)
    run.train()
    assert all(0 < numbers["memory"] < 1 << 24 for numbers in heard.numbers)
    run.denoiser.end_streaming()


def test_seeds_are_nobody_elses(second, trainer):
    torch.manual_seed(3)
    expected = torch.randn(4, device=HERE), torch.randn(4)
    run = trainer("run", 0, dropout=0.5)
    torch.manual_seed(3)
    Discriminator((8,), seed=1)
    run.train()
    assert torch.equal(torch.randn(4, device=HERE), expected[0]) and torch.equal(torch.randn(4), expected[1])
    same(trainer("again", 2, dropout=0.5).train(), run.lora())


@pytest.fixture
def every_size(monkeypatch):
    """Weights of every size are copied on their own where they lie, as large ones are."""
    monkeypatch.setattr(masters, "SMALL", 100)


@pytest.mark.parametrize("kind", ["pinned", "staged", "staged in part"])
@pytest.mark.parametrize("buffers", [1, 2])
def test_fetches_are_in_time_from_pinned_and_from_staged_memory(second, every_size, kind, buffers):
    made = streamed.network("fp32")
    adapters, x = streamed.adapted(made), streamed.start()
    checkpointing.enable(made)

    def passes(x):
        adapters.switch("student")
        made.zero_grad()
        for scale in (1.0, 2.0):
            (made(x * scale).square().mean() * made(-x).square().mean()).backward()
        gradients = {name: p.grad.cpu() for name, p in adapters.parameters("student").items()}
        with torch.no_grad():
            return gradients | {"x": made(x, stop=3).cpu()}

    expected = passes(x)
    checkpointing.disable(made)
    held = []

    def pin(tensor):
        if kind == "staged" or (kind == "staged in part" and len(held) > 3):
            return False
        pinned = tensor.clone().pin_memory()
        tensor.set_(pinned.untyped_storage(), 0, tensor.shape, tensor.stride())
        held.append(pinned)
        return True

    ring = Ring(made, HERE, 4, buffers=buffers, pin=pin, unpin=lambda tensor: None)
    checkpointing.enable(made)
    assert {block.master.pinned for block in ring.blocks} == {
        "pinned": {True}, "staged": {False}, "staged in part": {True, False},
    }[kind]  # fmt: skip
    second.reset_counts()
    same(passes(x.to(HERE)), expected)
    assert second.counts()["late"] > 8  # the copies ran when somebody waited for them, and not before
    same(passes(x.to(HERE)), expected)
    assert buffers == 1 or ring.late < ring.copies / 2
    ring.close()
    assert all(p.device == CPU for name, p in made.named_parameters() if "lora_" not in name and "blocks" in name)
    gc.collect()
    torch.accelerator.synchronize()


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("buffers", [1, 2])
def test_no_more_buffers_are_alive_than_the_ring_has(second, every_size, monkeypatch, pinned, buffers):
    """In whatever order blocks are entered: one that was expected and is not wanted may still be under way."""
    stage = transfers.Copies._stage

    def slowly(self, *given):
        time.sleep(0.02)
        return stage(self, *given)

    def pin(tensor):
        if pinned:
            tensor.set_(tensor.clone().pin_memory().untyped_storage(), 0, tensor.shape, tensor.stride())
        return pinned

    monkeypatch.setattr(transfers.Copies, "_stage", slowly)
    made = streamed.network("fp32", counts=(4, 0), width=256)
    expected = [[p.clone() for p in block.parameters()] for block in made.late]
    ring = Ring(made, HERE, 4, buffers=buffers, pin=pin, unpin=lambda tensor: None)
    assert {block.master.pinned for block in ring.blocks} == {pinned}
    (size,) = {block.master.size for block in ring.blocks}
    before = torch.accelerator.memory_allocated()
    for number in (0, 1, 3, 0, 2, 1, 0, 3, 2, 3, 1, 1, 0):
        torch.accelerator.reset_peak_memory_stats()
        with torch.no_grad():
            ring.enter(number)
        assert torch.accelerator.max_memory_allocated() - before <= buffers * size
        entered = [p.cpu() for p in made.late[number].parameters()]
        assert all(torch.equal(a, b) for a, b in zip(entered, expected[number], strict=True))
    assert buffers == 1 or 4 < ring.late < ring.copies - 4  # some blocks were expected rightly, and some were not
    ring.close()


def test_when_memory_ends_more_is_streamed_and_the_lora_is_the_same(second, room, trainer, monkeypatch):
    block = streamed.Block
    monkeypatch.setattr(streamed, "Block", lambda width, hidden: block(width, 64 * hidden))
    peaks = {}
    for count in (0, 4):
        run = trainer(f"with {count}", count, steps=4)
        expected = run.train()
        peaks[count] = run.truth.peak
        run.denoiser.end_streaming()
    assert peaks[4] < 0.8 * peaks[0]
    heard = Heard()
    began = torch.accelerator.memory_allocated()
    run = trainer("short", 0, steps=4, watcher=heard)
    step = run.step
    with contextlib.ExitStack() as limits:

        def short():
            """From the third step on there is less memory than so far."""
            if run.done == 2 and not heard.said:
                left = began + (peaks[0] + peaks[4]) // 2 - torch.accelerator.memory_allocated()
                limits.enter_context(room(left))
            return step()

        run.step = short
        same(run.train(), expected)
        assert run.denoiser.ring.count >= 3 and "memory ran out" in heard.said[0]
        assert (run.folder / "state.safetensors").is_file() and run.truth.peak < peaks[0]
        run.denoiser.end_streaming()


def test_a_moved_adapter_is_the_object_that_it_was(second):
    made = streamed.network("fp32")
    adapters = streamed.adapted(made)
    before = {name: (p, p.detach().clone()) for name, p in adapters.parameters("student").items()}
    ring = Ring(made, HERE, 2)
    for name, p in adapters.parameters("student").items():
        held, value = before[name]
        assert p is held and p.device.type == "second" and p.is_leaf and torch.equal(p.cpu(), value)
    ring.close()


class Clock:
    """Stands for `transfers.moment`: a second passes from one moment of a thread to its next, whenever others run."""

    def __init__(self):
        self.moments, self.own = 0, threading.local()

    def __call__(self, device):
        self.moments += 1
        self.own.now = getattr(self.own, "now", 0) + 1
        between = {"at": self.own.now, "elapsed_time": lambda self, later: 1e3 * (later.at - self.at)}
        return type("Moment", (), between)()


@pytest.mark.parametrize("pinned", [True, False])
def test_copies_and_waits_for_them_are_timed_without_a_wait(second, every_size, monkeypatch, pinned):
    from retort.trainers import streaming

    clock = Clock()
    for module in (streaming, transfers):
        monkeypatch.setattr(module, "moment", clock)
    monkeypatch.setattr(transfers, "TIMED", 5)

    def pin(tensor):
        if pinned:
            tensor.set_(tensor.clone().pin_memory().untyped_storage(), 0, tensor.shape, tensor.stride())
        return pinned

    made = streamed.network("fp32")
    ring, sizes = Ring(made, HERE, 4, pin=pin, unpin=lambda tensor: None), []
    fetch, x = ring._fetch, streamed.start().to(HERE)
    monkeypatch.setattr(ring, "_fetch", lambda number: sizes.append(ring.blocks[number].master.size) or fetch(number))

    def waits():
        second.reset_counts()
        with torch.no_grad():
            made(x)
        return second.counts()["waits"]

    waits()
    timed = waits()
    torch.accelerator.synchronize()
    speed, waited = ring.pace()
    assert speed == pytest.approx(sum(sizes[:5]) / 5)
    # Four blocks in each of two passes; by this clock the moments of copies without a thread are within what they wait.
    assert waited >= 8 and ring.pace()[1] == 0
    before = clock.moments
    again = waits()
    # How often the device waits for a copy that a thread makes depends on how far that is by then.
    assert clock.moments == before and (again == timed or not pinned)
    ring.stream(2)
    assert ring.pace() == (None, 0.0)
    ring.close()


def test_the_line_after_the_first_step_says_what_transfers_add(second, trainer, monkeypatch):
    from retort.trainers.counted import Counted

    heard = Heard()
    run = trainer("timed", 4, watcher=heard, offload="4")
    sizes = tuple(block.size for block in run.denoiser.ring.blocks)
    peaks = {"student backward": 1 << 20, "optimiser": 0}
    counted = Counted(sum(sizes), sizes, 1, 1, peaks, {"student forward": 10**9}, {"student forward": 1})
    run.forecast = planning.Forecast(counted, run.settings)
    monkeypatch.setattr(Ring, "pace", lambda self: (sum(sizes) / 100, 0.0))
    run.train()
    said = next(text for text in heard.said if text.startswith("memory after the first step: "))
    assert "about 200 s a step, transfer adds about 2" in said or "about 200 s a step, transfer adds about 19" in said
    run.denoiser.end_streaming()
