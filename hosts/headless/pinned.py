"""Host memory from which a CUDA device fetches by itself, registered where it lies."""

from __future__ import annotations

import contextlib
import os

import torch
from torch import Tensor

SHARE = 0.5  # of the machine's memory: what is pinned cannot be swapped out
_registered: dict[int, int] = {}


def pin(tensor: Tensor) -> bool:
    """Register a tensor's memory; False where CUDA refuses, and beyond half of the machine's memory."""
    size, address = tensor.nbytes, tensor.data_ptr()
    if not tensor.is_contiguous() or size + sum(_registered.values()) > SHARE * _memory():
        return False
    # torch's own pinned memory is a copy, and rounded up to a power of two.
    if int(torch.cuda.cudart().cudaHostRegister(address, size, 0)) != 0:
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")  # or else the next work of somebody else would report the error
        return False
    _registered[address] = size
    return True


def unpin(tensor: Tensor) -> None:
    """Give back what `pin` registered."""
    if _registered.pop(tensor.data_ptr(), None) is not None:
        torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())


def _memory() -> int:
    """Bytes of the machine's memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0
