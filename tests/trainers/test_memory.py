"""Bytes of weights, what checkpoints keep, and what to advise."""

from __future__ import annotations

import dataclasses

import pytest
import saved
import torch
from torch import Tensor, nn

from retort.trainers import checkpointing, memory
from retort.trainers.config import TrainingConfig, differences


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
    assert said.startswith("for a new run, make the latents smaller") and "8bit" not in said


@pytest.mark.parametrize("offload", ["none", "0", "2"])
def test_to_let_the_plan_stream_is_advised_before_all_else(offload):
    said = memory.advice(TrainingConfig(batch_size=1, offload=offload))
    assert said.startswith("to go on, set offload to auto; for a new run, make the latents smaller")
    assert "offload" not in memory.advice(TrainingConfig(batch_size=1))
    if offload != "2":  # which needs checkpoints itself
        said = memory.advice(TrainingConfig(offload=offload, gradient_checkpointing=False))
        assert said.startswith("to go on, set offload to auto and turn gradient_checkpointing on; for a new run, lower")


def test_what_a_begun_run_is_advised_to_change_it_may_change():
    given = TrainingConfig(batch_size=4, gradient_checkpointing=False, offload="none")
    going, new = memory.smaller(given)
    changed = dataclasses.replace(given, gradient_checkpointing=True, offload="auto")
    assert memory.smaller(changed) == ([], new) and len(going) == 2
    whole = [{"training": dataclasses.asdict(each)} for each in (given, changed)]
    assert not differences(*whole)
    refused = dataclasses.replace(given, batch_size=1, accumulation=4, optimiser="adafactor")
    assert len(differences(whole[0], {"training": dataclasses.asdict(refused)})) == 3
    assert memory.advice(given).count("to go on") == memory.advice(given).count("for a new run") == 1


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
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("CUDA_ERROR_OUT_OF_MEMORY"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
        RuntimeError("CUDA error: HIPBLAS_STATUS_NOT_INITIALIZED when calling `hipblasCreate(handle)`"),
        RuntimeError("miopenStatusAllocFailed"),
        RuntimeError("UR backend failed. UR backend returns:39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
        RuntimeError("level_zero backend failed with error: 38 (UR_RESULT_ERROR_OUT_OF_HOST_MEMORY)"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_every_way_to_say_that_memory_ended_is_known(error):
    assert memory.ran_out(error)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: device-side assert triggered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle)`",
        "CUDA error: HIPBLAS_STATUS_INTERNAL_ERROR when calling `hipblasGemmEx(handle)`",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
        "miopenStatusUnknownError",
        "UR backend failed. UR backend returns:20 (UR_RESULT_ERROR_DEVICE_LOST)",
        "out of resource: shared memory, Required: 147456, Hardware limit: 101376",
        "selected index k out of range",
        "CUDA error: unspecified launch failure",
    ],
)
def test_another_fault_of_the_card_is_none_of_memory(text):
    assert not memory.ran_out(torch.AcceleratorError(text)) and not memory.ran_out(RuntimeError(text))
