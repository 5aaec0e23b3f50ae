"""Bytes of weights, what checkpoints keep, and what to advise."""

from __future__ import annotations

import pytest
import saved
import torch
from torch import Tensor, nn

from retort.trainers import checkpointing, memory
from retort.trainers.config import TrainingConfig


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


def test_a_quantised_weight_is_counted_by_its_parts():
    network = nn.Module()
    network.weight = nn.Parameter(Scaled(torch.ones(4, 6, dtype=torch.int8), torch.ones(4, 1)), requires_grad=False)
    assert memory.weights(network) == 4 * 6 + 4 * 4


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
    with (kept := saved.SavedBytes(network)):
        network(x, text)
    checkpointing.disable(network)
    assert kept.count >= 3 * 2 * x.numel() * 4


def test_the_strongest_setting_is_advised_first():
    said = memory.advice(TrainingConfig(batch_size=4, gradient_checkpointing=False))
    assert said.index("gradient_checkpointing") < said.index("batch_size from 4") < said.index("adamw8bit")
    said = memory.advice(TrainingConfig(batch_size=1, gradient_checkpointing=True, optimiser="adamw8bit"))
    assert said.startswith("make the latents smaller") and "8bit" not in said


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("HIP out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("HIP error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_every_way_to_say_that_memory_ended_is_known(error):
    assert memory.ran_out(error)


def test_another_fault_of_the_card_is_none_of_memory():
    assert not memory.ran_out(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
