"""A run's checkpoints at several strengths in one sheet, all drawn from the same noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files.folder import Inside
from ..sampling.prior import require_steps
from ..trainers.export import read_lora
from ..trainers.watch import checkpoints
from .compare import Sampling, sampled
from .contract import CLIP, MODEL, VAE, Host
from .rewards.sheet import labelled

MOST_STRENGTHS = 16


@dataclass
class Grid:
    """sheet: IMAGE with a row for each checkpoint, a column for each strength. images (N, H, W, 3), row by row.

    The first column is the model without a LoRA, unless 0 is among the strengths elsewhere.
    """

    sheet: Tensor
    images: Tensor
    labels: list[str]


def strengths_of(text: str) -> list[float]:
    """Numbers from a text such as "0.5, 0.75, 1". ValueError for anything else."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not 0 < len(found) <= MOST_STRENGTHS or not all(math.isfinite(one) and abs(one) <= 100 for one in found):
        raise ValueError(
            f'strengths must be 1 to {MOST_STRENGTHS} numbers with commas between, such as "0.5, 0.75, 1", '
            f"got {text!r:.60}"
        )
    return found


def chosen(folder: Path, points: int) -> list[Inside]:
    """At most so many of a run's checkpoints, evenly, the last with them. ValueError where there is none."""
    kept = checkpoints(folder)
    if not kept:
        raise ValueError(
            f"run: {folder.name!r:.140} has kept no checkpoint; train with `keep` above 0 and `save_every`, or press "
            "Save now"
        )
    count = min(points, len(kept))
    return [kept[len(kept) - 1 - (i * len(kept)) // count] for i in reversed(range(count))]


def draw(
    host: Host, model: MODEL, clip: CLIP, vae: VAE, kept: Sequence[Inside], strengths: Sequence[float],
    prompt: str, negative: str, sampling: Sampling, seed: int,
) -> Grid:  # fmt: skip
    """Sample each checkpoint at each strength, from the noise of one seed. ValueError for a LoRA that does not fit."""
    require_steps(sampling.sigmas, "compare")
    encoded = host.encode_text(clip, prompt)
    without = host.encode_text(clip, negative) if sampling.cfg != 1 else None
    strengths = strengths if 0 in strengths else [0.0, *strengths]
    progress = host.progress(len(kept) * len(strengths))
    alone = sampled(host, host.cfg_guider(model, encoded, without, sampling.cfg), vae, sampling, [seed])[:, 0]
    images, labels = [], []
    for path in kept:
        lora, step = read_lora(path.checked()), int(path.name.removeprefix("step_").removesuffix(".safetensors"))
        for strength in strengths:
            host.check_cancelled()
            if strength:
                patched = host.with_weights(model, lora, path.name, strength)
                guider = host.cfg_guider(patched, encoded, without, sampling.cfg)
            images.append(sampled(host, guider, vae, sampling, [seed])[:, 0] if strength else alone)
            labels.append(f"step {step}, strength {strength:g}" if strength else "without the LoRA")
            progress.step(len(images))
    joined = torch.cat(images)
    return Grid(labelled(joined, labels, [False] * len(labels), len(strengths)), joined, labels)
