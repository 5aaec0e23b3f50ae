"""The one thing a reward is: images and their prompts in, a number for each out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Reward(Protocol):
    """`reward(images, prompts) -> (B,)`: the higher the better.

    images (B, H, W, 3) in [0, 1] as ComfyUI's IMAGE; prompts one string for all, or B of them. name: for people.
    differentiable: whether gradients reach the images.
    """

    name: str
    differentiable: bool

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest value there can be."""
        ...

    def __call__(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """(B,) fp32."""
        ...


class Holder(Protocol):
    """A network that whoever runs us places and frees: `load` before each use, since it may have been moved away."""

    network: nn.Module

    def load(self) -> torch.device:
        """Put the network where it computes and return that device."""
        ...

    def offload(self) -> None:
        """Take it off that device; the next `load` brings it back."""
        ...


def require_differences(reward: Reward) -> None:
    """ValueError for a reward whose range is one number, such as a combination of which every weight is 0."""
    low, high = reward.range
    if low == high:
        raise ValueError(
            f"the reward {reward.name} gives every picture the same score, {low:g}, so nothing can be learnt or found "
            "by it: give it a weight, or connect another reward"
        )
