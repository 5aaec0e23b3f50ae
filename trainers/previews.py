"""Pictures of the student while it trains: fixed prompts and starts, the weights and the sampling of its users."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .config import TrainingConfig
from .data import Data
from .denoiser import Denoiser
from .objectives.parts.contract import Draws, Objective

# Of a video a preview shows so many, from its first to its last.
FRAMES = 4


def rows_of(data: Data, settings: TrainingConfig) -> list[int]:
    """The samples that a preview shows: the first ones of one size, from the beginning again where there are few."""
    rows = [i % len(data) for i in range(settings.previews)]
    kind = data.kind_of(rows[0])
    return [i for i in rows if data.kind_of(i) == kind]


@torch.no_grad()
def draw(
    denoiser: Denoiser, objective: Objective, data: Data, settings: TrainingConfig, decode: Callable[[Tensor], Tensor]
) -> Tensor:
    """Pictures (B, H, W, 3) in [0, 1] of the first prompts; B is settings.previews, fewer where sizes differ, and
    FRAMES of each for videos, whose frames `decode` gives one after another.
    """
    rows = rows_of(data, settings)
    parts = data.parts_of(rows[0])
    pictures = []
    with denoiser.adapter(objective.players["student"].adapter), without_dropout(denoiser.network):
        for begin in range(0, len(rows), settings.batch_size):
            part = rows[begin : begin + settings.batch_size]
            draws = Draws(settings.seed, -2, tuple(range(begin, begin + len(part))), denoiser.device)
            cond = denoiser.join([data.conds[i] for i in part])
            uncond = data.without(denoiser, part)
            made = objective.sample(data.start(part, draws, "preview"), cond, uncond)
            images = decode(parts.first(made)).cpu()
            frames = images.unflatten(0, (len(part), -1))
            if frames.shape[1] > FRAMES:
                frames = frames[:, torch.linspace(0, frames.shape[1] - 1, FRAMES).round().long()]
            pictures.append(frames.flatten(0, 1))
    return torch.cat(pictures)


@contextmanager
def without_dropout(network: nn.Module) -> Iterator[None]:
    """The adapters' dropout off, as it is for whoever samples."""
    dropped = [module for module in network.modules() if isinstance(module, nn.Dropout) and module.training]
    for module in dropped:
        module.eval()
    try:
        yield
    finally:
        for module in dropped:
            module.train()
