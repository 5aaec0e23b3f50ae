"""Two losses at once without weights: the shortest combination of their gradients, which lessens both.

MGDA (Desideri 2012) in the two-task closed form of Sener & Koltun 2018 (arXiv 1810.04650), on the gradients by
what the tasks share (its MGDA-UB): here the sampled latents, so that the network is passed backwards once.
"""

from __future__ import annotations

from torch import Tensor


def share(first: Tensor, second: Tensor) -> Tensor:
    """alpha (0-d) in [0, 1] of the shortest alpha first + (1 - alpha) second; one half where they are equal.

    The result d has d . g >= |d|^2 for both gradients g, and is 0 where they oppose each other.
    """
    apart = (first - second).double().flatten()
    length = apart @ apart
    if not length:
        return first.new_tensor(0.5)
    return (-(apart @ second.double().flatten()) / length).clamp(0, 1).to(first)
