"""What a run will need before it starts, and which setting to change when that is too much."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .config import AUTO, TrainingConfig


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


def smaller(config: TrainingConfig) -> tuple[list[str], list[str]]:
    """What lowers memory, the strongest first, as this run has it: what a begun run may change, what only a new one."""
    going = ["set offload to auto"] if config.offload != AUTO else []
    if not config.gradient_checkpointing:
        going.append("turn gradient_checkpointing on")
    new = []
    if config.batch_size > 1:
        new.append(f"lower batch_size from {config.batch_size} and raise accumulation by as much")
    new.append("make the latents smaller (a lower resolution)")
    if config.optimiser == "adamw":
        new.append("choose optimiser adafactor or adamw8bit")
    new.append("lower the rank, or train fewer layers (targets)")
    return going, new


def advice(config: TrainingConfig) -> str:
    """The settings that lower memory, apart for a run that has begun, which goes on with its own others alone."""
    going, new = smaller(config)
    first = [f"to go on, {' and '.join(going)}"] if going else []
    return "; ".join([*first, f"for a new run, {new[0]}", *new[1:]])


# CUDA's libraries take memory past torch's allocator, and its BLAS may say no more than that it could not begin.
_ENDED = re.compile(
    r"out[ _]?of[ _]?((device|host)[ _]?)?memory|alloc_?failed|blas_status_not_initialized|defaultcpuallocator",
    re.IGNORECASE,
)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ended, for which torch has a class where its own allocator noticed."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(_ENDED.search(str(error)))
