"""Host memory that is given back as soon as it is free, where a network computes on the processor.

glibc keeps freed memory for later, and with weights that are cast for one product after another its gaps come to a
fifth of the network. Large allocations of their own go back to the system at once (mallopt(3)). They cost page faults,
so that small networks are left alone.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

LARGE = 2**30  # bytes of weights
_OWN = 2**18  # bytes from which an allocation is one of its own meanwhile
_USUAL = 2**25  # where glibc's own moving threshold ends once a program has freed something large
_MMAP_THRESHOLD = -3  # malloc.h's M_MMAP_THRESHOLD


@contextmanager
def given_back(device: torch.device, weights: int) -> Iterator[None]:
    """Within it, freed memory leaves the process, where a network of `weights` bytes computes on a processor.

    Nothing for less than LARGE, and without glibc.
    """
    library = _glibc() if device.type == "cpu" and weights >= LARGE else None
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _OWN)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, _USUAL)
        library.malloc_trim(0)


def _glibc() -> Any:
    """The C library, None where it is another than glibc."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL(None)
            library.gnu_get_libc_version  # noqa: B018  # others lack it
            return library
    return None
