"""The embedded captioner: the judge, taught further on damaged digits, says in the prompt's own words what it sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import digits, loader

NAMES = {"digit": digits.NUMBERS, "ink": digits.COLOURS, "paper": digits.COLOURS}


class Captioner(nn.Module):
    """Digit and colours of pictures of any size, with probabilities; a word less likely than `least` is left out."""

    def __init__(self, judge: nn.Module, least: float = 0.0):
        super().__init__()
        if not 0 <= least < 1:
            raise ValueError(f"least is {least!r}; it is a probability below 1, and 0 leaves no word out")
        self.judge, self.least = judge, least

    def probabilities(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, H, W, 3) in [0, 1] -> (B, classes) for "digit", "ink" and "paper", each row of sum 1."""
        if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
            raise ValueError(f"images have shape {tuple(images.shape)}; give (B, H, W, 3), none of them 0")
        size = (digits.SIZE, digits.SIZE)
        seen = F.interpolate(images.movedim(-1, 1).float(), size=size, mode="bicubic", antialias=True).clamp(0, 1)
        answers = self.judge(seen)
        return {name: answers[name].softmax(-1) for name in NAMES}

    @torch.no_grad()
    def caption(self, images: Tensor) -> list[str]:
        """One caption for each image (B, H, W, 3) in [0, 1], such as "a blue seven on yellow paper"."""
        found = self.probabilities(images)
        return [
            phrase(*(_word(found[name][i], words, self.least) for name, words in NAMES.items()))
            for i in range(len(images))
        ]


def _word(chances: Tensor, words: tuple[str, ...], least: float) -> str | None:
    best = int(chances.argmax())
    return words[best] if float(chances[best]) >= least else None


def phrase(digit: str | None, ink: str | None, paper: str | None) -> str:
    """What is known, in the words that the embedded model was trained with."""
    text = " ".join(word for word in (ink, digit or "digit") if word)
    text = f"{'an' if text[0] in 'aeiou' else 'a'} {text}"
    return f"{text} on {paper} paper" if paper else text


def load(least: float = 0.0) -> Captioner:
    """The captioner that comes with Retort, in fp32."""
    return Captioner(loader.load_judge(loader.CAPTIONER), least).eval()
