"""Scores of pictures by any reward, with what goes in and what comes out checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..restoration.hidden import filled
from .contract import Reward


def each(prompts: str | Sequence[str], count: int) -> list[str]:
    """One prompt for each of `count` images. ValueError when there is another number of them."""
    if isinstance(prompts, str):
        return [prompts] * count
    if len(prompts) != count:
        raise ValueError(f"there are {len(prompts)} prompts for {count} images: give one for all, or one for each")
    return list(prompts)


def checked(images: Tensor) -> Tensor:
    """Images (B, H, W, 3) in fp32; alpha is left out. ValueError for another shape."""
    if images.ndim != 4 or images.shape[-1] not in (3, 4) or 0 in images.shape:
        raise ValueError(
            f"images have shape {tuple(images.shape)}: a reward takes (B, H, W, 3) with values from 0 to 1, as an "
            "IMAGE has them"
        )
    return filled(images)[..., :3].float()


def score(reward: Reward, images: Tensor, prompts: str | Sequence[str], batch: int = 0) -> Tensor:
    """(B,) scores, at most `batch` images at once (0: all), which changes nothing but memory.

    images (B, H, W, 3), or videos (B, T, H, W, 3) whose score is the mean over their frames. ValueError names the
    reward when it gives another shape than (B,), NaN or infinity.
    """
    if images.ndim == 5:
        b, t = images.shape[:2]
        words = [prompt for prompt in each(prompts, b) for _ in range(t)]
        return score(reward, images.flatten(0, 1), words, batch).view(b, t).mean(1)
    words = each(prompts, len(images))
    size = batch or max(1, len(images))
    parts = []
    for begin in range(0, len(images), size):
        part = images[begin : begin + size]
        found = reward(part, words[begin : begin + size])
        if not isinstance(found, Tensor) or found.shape != (len(part),):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"the reward {reward.name} gave {got} for {len(part)} images: it must give one number each"
            )
        if not torch.isfinite(found).all():
            wrong = [begin + i for i in (~torch.isfinite(found)).nonzero()[:, 0].tolist()]
            raise ValueError(
                f"the reward {reward.name} is {float(found[wrong[0] - begin])} for image {wrong[0]} "
                f"({len(wrong)} of {len(part)} such): look at that image, or use another reward"
            )
        parts.append(found.float())
    return torch.cat(parts) if parts else images.new_zeros(0)
