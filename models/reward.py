"""The embedded judge as a reward: log p of the digit and the colours that a prompt names, and boldness if wished."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..rewards.contract import Holder
from ..rewards.preprocess import Preprocess
from ..rewards.scoring import each
from . import digits, loader
from .text import weighted_spans

_WORD = re.compile(r"[a-z]+|\d|,")
_PAPER = ("paper", "background")
BOLD = digits.WEIGHTS.index("bold")


def wanted(prompt: str) -> dict[str, int]:
    """What a prompt asks for: classes of "digit", "ink" and "paper", those that it names.

    The first number is the digit. A colour right before "paper" or "background" is the paper's, the first other the
    ink's. Prompt weights are left out.
    """
    text = " ".join(span for span, _ in weighted_spans(prompt)).lower()
    words = _WORD.findall(text)
    found: dict[str, int] = {}
    for i, word in enumerate(words):
        if word in digits.NUMBERS or word.isdigit():
            found.setdefault("digit", int(word) if word.isdigit() else digits.NUMBERS.index(word))
        elif word in digits.COLOURS:
            paper = words[i + 1 : i + 2] and words[i + 1] in _PAPER
            found.setdefault("paper" if paper else "ink", digits.COLOURS.index(word))
    return found


@dataclass(eq=False)
class JudgeReward:
    """log p(digit) + log p(ink) + log p(paper), those the prompt names, + boldness * log p(bold stroke).

    boldness: 0 scores the prompt alone; prompts that do not ask for a bold stroke make it a wish of its own.
    """

    holder: Holder
    boldness: float = 0.0
    name: str = "embedded judge"
    differentiable: bool = True
    range: tuple[float, float] = (-math.inf, 0.0)

    def __post_init__(self) -> None:
        if not math.isfinite(self.boldness):
            raise ValueError(f"boldness {self.boldness} must be a finite number; 0 leaves it out")
        if self.boldness < 0:
            self.range = (-math.inf, math.inf)
        self._fit = Preprocess(digits.SIZE, "stretch", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def __call__(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """(B,) fp32. ValueError for a prompt that names nothing which the judge can see, unless boldness is wished."""
        asks = [wanted(prompt) for prompt in each(prompts, len(images))]
        for prompt, ask in zip(each(prompts, len(images)), asks, strict=True):
            if not ask and not self.boldness:
                raise ValueError(
                    f"prompt {prompt!r} names no digit and no colour, which is all that the embedded judge can see: "
                    'try "a blue seven on yellow paper"'
                )
        device = self.holder.load()
        answers = {n: v.log_softmax(-1) for n, v in self.holder.network(self._fit(images.to(device))).items()}
        total = self.boldness * answers["weight"][:, BOLD]
        for name in ("digit", "ink", "paper"):
            rows = [i for i, ask in enumerate(asks) if name in ask]
            if rows:
                classes = torch.tensor([asks[i][name] for i in rows], device=device)
                part = answers[name][torch.tensor(rows, device=device), classes]
                total = total.index_add(0, torch.tensor(rows, device=device), part)
        return total.float().to(images.device)


def judge_reward(hold: Callable[[nn.Module], Holder], boldness: float = 0.0) -> JudgeReward:
    """The judge that comes with Retort, placed by whoever runs us."""
    return JudgeReward(hold(loader.load_judge()), boldness)
