"""The finished LoRA as a file: what made it, how, and from what, in the metadata that other programs read."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timezone
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import weights
from ..files.atomic import TYPES, tensors, write_new
from .config import RunConfig

# As in pyproject.toml; ComfyUI imports the folder without installing it, so no installer can be asked.
VERSION = "0.1.0"

# fp16 rounds normal numbers by 3e-4 of themselves at most; below 6e-5 its step stays 6e-8, its least number.
_COARSE = 1e-3
_LEAST = 2.0**-24


def metadata(config: RunConfig, steps: int, title: str, base: str, base_hash: str, version: str) -> dict[str, str]:
    """modelspec (the Stability metadata convention), ss_ (kohya's) and retort's own keys; all values are strings."""
    training, lora = config.training, config.lora
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title,
        "modelspec.architecture": f"{base}/lora",
        "modelspec.date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S"),
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(lora.rank),
        # alpha / rank is multiplied into the file's weights, so that it is 1 for whoever reads it.
        "ss_network_alpha": str(lora.rank),
        "ss_steps": str(steps),
        "ss_learning_rate": str(training.learning_rate),
        "ss_optimizer": training.optimiser,
        "ss_seed": str(training.seed),
        "ss_base_model_version": base,
        "retort.method": config.method,
        "retort.steps": str(steps),
        "retort.version": version,
        "retort.base_hash": base_hash,
        "retort.config": json.dumps(config.to_json(), sort_keys=True),
    }


def weights_hash(state: dict[str, Tensor]) -> str:
    """A hash of a network's weights that is quick on large ones: names, shapes and a sample of each tensor."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().flatten()
        digest.update(f"{name}{tuple(state[name].shape)}".encode())
        if tensor.numel() and tensor.is_floating_point():
            step = max(1, tensor.numel() // 64)
            digest.update(tensor[::step][:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def stored(tensor: Tensor) -> Tensor:
    """A LoRA's tensor as its file has it: fp16 within a thousandth of its size, else, as small as it is, in fp32.

    Weights that are not zero stay so: those below fp16's least number are raised to it, which the same bound covers.
    """
    if not bool((tensor.abs() < 6e4).all()):
        return tensor
    small = tensor.half()
    lost = (small == 0) & (tensor != 0)
    small = torch.where(lost, torch.full_like(small, _LEAST).copysign(tensor.half()), small)
    exact = tensor.double()
    return small if bool((small.double() - exact).norm() <= _COARSE * exact.norm()) else tensor


def write_lora(folder: Path, name: str, lora: dict[str, Tensor], notes: dict[str, str]) -> Path:
    """Write a LoRA, each tensor as `stored` gives it, under a name that nothing has yet; its path."""
    return write_new(folder, name, tensors({key: stored(value) for key, value in lora.items()}, notes))


def read_lora(path: Path) -> dict[str, Tensor]:
    """The tensors of a LoRA file. ValueError when it cannot be read, or holds what are no weights."""
    found = weights.load(path)
    for name, tensor in found.items():
        if tensor.dtype not in (*TYPES, torch.float8_e4m3fn, torch.float8_e5m2):
            raise ValueError(
                f"the LoRA {path} holds {name!r:.80} of {tensor.dtype}, which are no weights; get it again"
            )
    broken = [name for name, tensor in found.items() if not _finite(tensor)]
    if broken:
        raise ValueError(
            f"the LoRA {path} holds values that are no finite numbers, in {len(broken)} of its {len(found)} tensors, "
            f"such as {broken[0]!r:.80}: it was damaged, or its training failed; get it again or choose another file"
        )
    return found


def _finite(tensor: Tensor) -> bool:
    # There is no isfinite for numbers of 8 bits.
    return bool((tensor.float() if tensor.element_size() == 1 else tensor).isfinite().all())


def lora_stamp(path: Path) -> tuple[int, int]:
    """When a file was written, in nanoseconds, and its size in bytes."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def lora_metadata(path: Path) -> dict[str, str]:
    """The metadata of a LoRA file. ValueError when it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the LoRA {path} cannot be read: {error}; get it again") from error
