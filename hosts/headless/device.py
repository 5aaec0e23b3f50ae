"""Where networks run, and in which precision."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from ...files.errors import UsageError

CHOSEN = "RETORT_DEVICE"  # environment variable: a device as torch names it, for all networks of the process


def device() -> torch.device:
    """The device that RETORT_DEVICE names, else the CUDA device that was taken or the first, else the CPU.

    UsageError for a name that torch does not know.
    """
    chosen = os.environ.get(CHOSEN)
    if not chosen:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(chosen)
    except RuntimeError as error:
        raise UsageError(f"{CHOSEN}={chosen} is no device of this torch: use cpu, cuda, cuda:1, xpu or mps") from error


def take(number: int) -> None:
    """Let networks of this process run on the CUDA device of this number, if there is any; more processes share."""
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def dtype(preferred: torch.dtype) -> torch.dtype:
    """`preferred` on a GPU; fp32 on the CPU, where half precision is slow and ComfyUI does not use it either."""
    return torch.float32 if device().type == "cpu" else preferred


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
