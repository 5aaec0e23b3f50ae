"""Picture quality by the words of a vision-language model: DeQA-Score (You et al. 2025, arXiv 2501.11561).

Asked how good a picture is, the model continues "The quality of the image is". The softmax over the first tokens of
five words there, times [5, 4, 3, 2, 1], is the score (Q-Align's level tokens, arXiv 2312.17090). The prompt plays no
part. The published weights need an old transformers and run as a process of their own; any other model runs here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import Holder
from .preprocess import to_bytes
from .scoring import checked, each

LEVELS = {"excellent": 5.0, "good": 4.0, "fair": 3.0, "poor": 2.0, "bad": 1.0}
QUESTION = "How would you rate the quality of this image?"
ANSWER = "The quality of the image is"


def expected_level(logits: Tensor) -> Tensor:
    """Logits (B, 5) of the level words, best first -> (B,) in 1..5."""
    weights = torch.tensor(list(LEVELS.values()), device=logits.device)
    return logits.float().softmax(-1) @ weights


def level_tokens(encode: Callable[[str], Sequence[int]]) -> list[int]:
    """First token of each level word after `ANSWER`. encode: text -> ids. ValueError when two words begin alike."""
    begin = list(encode(ANSWER))
    tokens = []
    for word in LEVELS:
        ids = list(encode(f"{ANSWER} {word}"))
        # Compared token by token: some tokenizers close a text with tokens of their own.
        at = next((i for i, (a, b) in enumerate(zip(ids, begin, strict=False)) if a != b), min(len(ids), len(begin)))
        if at >= len(ids):
            raise ValueError(f"its tokenizer gives no token to the word {word!r}: use another model")
        tokens.append(ids[at])
    if len(set(tokens)) < len(tokens):
        raise ValueError(
            f"its tokenizer begins some of {', '.join(LEVELS)} with the same token ({tokens}): use another model"
        )
    return tokens


@dataclass(eq=False)
class LevelReward:
    """See `contract.Reward`. prepare: uint8 pictures (B, H, W, 3) -> what the network takes; it gives (B, 5) logits."""

    holder: Holder
    prepare: Callable[[Tensor], Mapping[str, Tensor]]
    name: str = "DeQA"
    differentiable: bool = False
    range: tuple[float, float] = (1.0, 5.0)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """(B,) fp32."""
        each(prompts, len(checked(images)))
        inputs = self.prepare(to_bytes(images))
        device = self.holder.load()
        logits = self.holder.network({k: v.to(device) for k, v in inputs.items()})
        return expected_level(logits).to(images.device)
