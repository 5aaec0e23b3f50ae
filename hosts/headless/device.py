"""Where networks run, and in which precision."""

from __future__ import annotations

from importlib.util import find_spec

import torch


def device() -> torch.device:
    """The first CUDA device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype(preferred: torch.dtype) -> torch.dtype:
    """`preferred` on a GPU; fp32 on the CPU, where half precision is slow and ComfyUI does not use it either."""
    return preferred if device().type == "cuda" else torch.float32


def has_xformers() -> bool:
    """Whether xformers' attention can be used: it has kernels for CUDA only."""
    return device().type == "cuda" and find_spec("xformers") is not None
