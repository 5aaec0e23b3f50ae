"""What a run will need before it starts, and which setting to change when that is too much."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .config import TrainingConfig


def size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"


def weights(network: nn.Module) -> int:
    """Bytes of a network's parameters and buffers, tied ones once."""
    return sum(_storages(network).values())


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor consists of: itself, or a quantised one's numbers and scales.

    Such a tensor has no storage of its own; it says by torch's protocol for subclasses what it is made of.
    """
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from parts(getattr(tensor, name))


def _storages(network: nn.Module) -> dict[int, int]:
    """Address and bytes of each storage that a network's parameters and buffers lie in, streamed ones apart."""
    tensors = [tensor for tensor in (*network.parameters(), *network.buffers()) if not tensor.is_meta]
    found = [part.untyped_storage() for tensor in tensors for part in parts(tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def advice(config: TrainingConfig) -> str:
    """The settings that lower memory, the strongest first, as this run has them."""
    ways = []
    if not config.gradient_checkpointing:
        ways.append("turn gradient_checkpointing on")
    if config.batch_size > 1:
        ways.append(f"lower batch_size from {config.batch_size} and raise accumulation by as much")
    ways.append("make the latents smaller (a lower resolution)")
    if config.optimiser == "adamw":
        ways.append("choose optimiser adafactor or adamw8bit")
    ways.append("lower the rank, or train fewer layers (targets)")
    return "; ".join(ways)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ended, for which torch has a class where its own allocator noticed.

    CUDA's libraries take memory past that one, and cuBLAS says no more than that it could not begin.
    """
    signs = (
        "DefaultCPUAllocator", "MPS backend out of memory", "CUDA error: out of memory", "HIP out of memory",
        "HIP error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED",
    )  # fmt: skip
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in signs)
