"""What a training asks of the headless host besides the model: pictures, progress, folders and memory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files import weights as files
from ...files.errors import UsageError
from ...trainers.decoder import Decoder
from . import folders, pinned, progress
from .device import device, has_bf16
from .model import Clip, Conditioning, Model, Vae

_log = logging.getLogger("retort")


def encode_text(clip: Clip, text: str) -> Conditioning:
    """See `hosts.api`."""
    return clip.encode(text)


def latents_in(model: Model, samples: Tensor) -> Tensor:
    """See `hosts.api`."""
    form = model.latent
    if samples.shape[1] != form.channels:
        raise UsageError(
            f"the latents have {samples.shape[1]} channels and the model takes {form.channels}: encode the images "
            "with the VAE that belongs to the model"
        )
    with torch.inference_mode(False):
        return form.process_in(samples.detach().clone().float().cpu())


@torch.no_grad()
def encode_images(vae: Vae, images: Tensor) -> dict[str, Tensor]:
    """See `hosts.api`."""
    return {"samples": vae.encode(images)}


@torch.no_grad()
def decode(vae: Vae, samples: Tensor) -> Tensor:
    """See `hosts.api`."""
    return vae.decode(samples)


def differentiable_decoder(vae: Vae) -> Decoder:
    """See `hosts.api`."""
    return Decoder(vae.network(), vae.decode)


class Progress:
    """What the run's watcher sees; see `hosts.api`."""

    def __init__(self, total: int):
        self.total = total

    def step(self, done: int, preview: Any = None, text: str = "") -> None:
        """`done` of `total` steps are finished; pictures and texts stand in the run's own folder."""
        progress.step(done, self.total)


def say(text: str, warn: bool = False) -> None:
    """See `hosts.api`."""
    heard = progress.say(text)
    # Python prints warnings by itself, so that a user who has heard it would read it twice.
    _log.log(logging.WARNING if warn and not heard else logging.INFO, text)


def check_cancelled() -> None:
    """See `hosts.api`; Ctrl+C raises by itself."""


def free_memory() -> int | None:
    """See `hosts.api`."""
    if device().type == "cpu":
        return None
    module = torch.get_device_module(device())
    return module.mem_get_info(device())[0] if hasattr(module, "mem_get_info") else None


def make_room() -> None:
    """See `hosts.api`; nothing is held here from one call to the next."""


def pin(tensor: Tensor) -> bool:
    """See `hosts.api`; half of the machine's memory at most, since what is pinned cannot be swapped out."""
    return device().type == "cuda" and pinned.pin(tensor)


def unpin(tensor: Tensor) -> None:
    """See `hosts.api`."""
    pinned.unpin(tensor)


def bf16() -> bool:
    """See `hosts.api`."""
    return has_bf16()


def loras_folder() -> Path:
    """See `hosts.api`."""
    where = folders.current()
    return (where.models[0] if where.models else where.output) / "loras"


def runs_folder() -> Path:
    """See `hosts.api`."""
    return folders.current().output / "retort"


def statistics_folders() -> list[Path]:
    """See `hosts.api`."""
    where = folders.current()
    roots = [*(where.models or (where.output,)), folders.EMBEDDED]
    return [root / "gaussian_statistics" for root in roots]


def captioners_folders() -> list[Path]:
    """See `hosts.api`."""
    return [root / "captioners" for root in folders.current().models]


def input_folders() -> list[Path]:
    """See `hosts.api`."""
    return list(folders.current().inputs)


def lora_names() -> list[str]:
    """See `hosts.api`."""
    return folders.current().names("loras")


def read_lora(name: str) -> dict[str, Tensor]:
    """See `hosts.api`."""
    with torch.inference_mode(False):
        return files.load(folders.current().model("loras", name))
