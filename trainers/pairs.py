"""Teacher pairs for regression: noise and what the guided teacher makes of it, computed once and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..files.atomic import tensors, write_atomically
from ..files.folder import Inside, inside
from .data import Data
from .denoiser import Denoiser
from .objectives.parts.contract import Draws
from .watch import Watcher

NOTE = "made_for.json"


class PairMaker(Protocol):
    """An objective that learns from teacher pairs."""

    @property
    def pairs(self) -> int:
        """How many it wants (0 = none); rounded up to a whole number for each prompt."""
        ...

    def make_pairs(self, noise: Tensor, cond, uncond) -> Tensor:
        """The teacher's x0 from unit noise (B, ...)."""
        ...


@torch.no_grad()
def make(
    maker: PairMaker,
    denoiser: Denoiser,
    data: Data,
    folder: Path | Inside,
    seed: int,
    batch_size: int,
    watcher: Watcher,
    made_for: Mapping[str, Any],
) -> dict[str, list[Tensor]]:
    """{"noise", "target"}: pairs in the order of prompts, `count / prompts` for each, in fp16, each as large as its
    sample's latent.

    They are written batch by batch, so that a run that was stopped here goes on where it was. made_for: the settings
    and data that they depend on; pairs that were made for others are made again.
    """
    kept = inside(folder) / "pairs"
    _forget_others(kept, made_for)
    each = -(-maker.pairs // len(data))
    total = each * len(data)
    parts: dict[str, list[Tensor]] = {"noise": [], "target": []}
    begin = end = 0
    while begin < total:
        shape, kind = data.shape_of(begin // each), data.kind_of(begin // each)
        # A batch is of one size.
        while end < min(total, begin + batch_size) and data.kind_of(end // each) == kind:
            end += 1
        places = tuple(range(begin, end))
        path = kept / f"{begin:07d}.safetensors"
        if path.is_file():
            try:
                found = load_file(path.checked())
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} cannot be read ({error}); delete the folder {path.parent}") from error
            wanted = (len(places), *shape)
            if any(name not in found or tuple(found[name].shape) != wanted for name in parts):
                raise ValueError(f"{path} holds no teacher pairs of this run; delete the folder {path.parent}")
        else:
            watcher.check()
            noise = Draws(seed, -1, places, denoiser.device).normal("pair", shape)
            cond = denoiser.join([data.conds[place // each] for place in places])
            uncond = data.without(denoiser, [place // each for place in places])
            target = maker.make_pairs(noise, cond, uncond)
            found = {"noise": noise.half(), "target": target.half()}
            write_atomically(path, tensors(found))
            watcher.phase("the model draws pairs to copy", places[-1] + 1, total)
        for name, values in parts.items():
            values += found[name].cpu()
        begin = end
    return parts


def _forget_others(folder: Inside, made_for: Mapping[str, Any]) -> None:
    """Delete pairs of other settings: a run that was stopped before its first step may come back with new ones."""
    note, mine = folder / NOTE, json.dumps(made_for, sort_keys=True)
    if note.is_file() and note.read() != mine.encode():
        folder.remove_tree()
    write_atomically(note, mine.encode())
