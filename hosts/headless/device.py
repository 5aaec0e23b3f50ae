"""Where networks run, and in which precision."""

from __future__ import annotations

from importlib.util import find_spec

import torch


def device() -> torch.device:
    """The CUDA device that was taken, else the first, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def take(number: int) -> None:
    """Let networks of this process run on the CUDA device of this number, if there is any; more processes share."""
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def dtype(preferred: torch.dtype) -> torch.dtype:
    """`preferred` on a GPU; fp32 on the CPU, where half precision is slow and ComfyUI does not use it either."""
    return preferred if device().type == "cuda" else torch.float32


def has_bf16() -> bool:
    """Whether the GPU computes in bf16 rather than emulate it; False on the CPU, where it is slow.

    torch itself counts emulation, with which every CUDA device has it.
    """
    if device().type != "cuda":
        return False
    if torch.version.hip is not None:
        kind = torch.cuda.get_device_properties(device()).gcnArchName
        return kind.startswith(("gfx9", "gfx11", "gfx12")) and not kind.startswith(("gfx900", "gfx906"))
    return torch.cuda.get_device_capability(device()) >= (8, 0)


def has_xformers() -> bool:
    """Whether xformers' attention can be used: it has kernels for CUDA only."""
    return device().type == "cuda" and find_spec("xformers") is not None
