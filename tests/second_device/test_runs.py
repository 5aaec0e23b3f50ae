"""Trainings with a streamed base on a card: to the bit as the CPU's, in time, and what they say of memory is true."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from retort.sampling.path import FLOW
from retort.trainers import planning
from retort.trainers.adapters import LoraConfig
from retort.trainers.data import Data
from retort.trainers.loop import Trainer
from retort.trainers.methods import METHODS, read_config
from retort.trainers.objectives.discriminator import Discriminator
from retort.trainers.watch import Silent

_spec = importlib.util.spec_from_file_location("streamed", Path(__file__).parents[1] / "trainers" / "streamed.py")
streamed = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(streamed)

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
