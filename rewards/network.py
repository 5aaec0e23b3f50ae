"""A reward that a network gives: pictures prepared, prompts as tokens, both to wherever the network is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .contract import Holder
from .preprocess import Preprocess
from .scoring import each

# Texts -> ids and attention mask, both (N, L).
Tokenize = Callable[[list[str]], tuple[Tensor, Tensor]]


@dataclass(eq=False)
class NetworkReward:
    """See `contract.Reward`.

    The network is called as network(pixels (B, 3, h, w)), or, where there is `tokenize`, as
    network(pixels, ids (N, L), mask (N, L), index (B,)): each different prompt stands once among the N, and index says
    which belongs to a picture. It gives (B,).
    """

    name: str
    holder: Holder
    preprocess: Preprocess
    range: tuple[float, float]
    tokenize: Tokenize | None = None
    differentiable: bool = True

    def __call__(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """(B,) fp32, on the images' device."""
        texts = each(prompts, len(images))
        device = self.holder.load()
        pixels = self.preprocess(images.to(device))
        if self.tokenize is None:
            return self.holder.network(pixels).float().to(images.device)
        different = list(dict.fromkeys(texts))
        ids, mask = self.tokenize(different)
        index = ids.new_tensor([different.index(text) for text in texts])
        scores = self.holder.network(pixels, *(t.to(device) for t in (ids, mask, index)))
        return scores.float().to(images.device)
