"""Two losses at once without weights: the shortest combination of their gradients, which lessens both.

MGDA (Desideri 2012) in the two-task closed form of Sener & Koltun 2018 (arXiv 1810.04650), on the gradients by
what the tasks share (its MGDA-UB): here the sampled latents, so that the network is passed backwards once. Each sample
has its own combination, so that a batch teaches what its samples teach; the whole still lessens both losses.
"""

from __future__ import annotations

import torch
from torch import Tensor


def share(first: Tensor, second: Tensor) -> Tensor:
    """alpha (B,) in [0, 1] of the shortest alpha first + (1 - alpha) second of (B, ...); one half where they are equal.

    The result d has d . g >= |d|^2 for both gradients g, and is 0 where they oppose each other.
    """
    apart, second = (first - second).flatten(1), second.flatten(1)
    length = apart.square().sum(1)
    alpha = -(apart * second).sum(1) / torch.where(length > 0, length, 1.0)
    return torch.where(length > 0, alpha.clamp(0, 1), 0.5)
