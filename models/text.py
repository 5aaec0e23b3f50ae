"""A word-level text encoder for the embedded model: a vocabulary of some forty words, sixteen tokens, a pooled output.

Prompt weights follow ComfyUI's notation and act as there: a token's state moves away from the empty prompt's.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import nn

from . import digits

LENGTH = 16
WIDTH = 128
_WORDS = (
    *digits.NUMBERS, *digits.COLOURS, *digits.WEIGHTS, *(s for s in digits.SLANTS if s != "upright"), "upright",
    "leaning", "on", "paper", "a", "an", "digit", "handwritten", ",",
)  # fmt: skip
PAD, START, UNKNOWN = 0, 1, 2
VOCABULARY = {word: i + 3 for i, word in enumerate(_WORDS)}
VOCABULARY |= {str(i): VOCABULARY[word] for i, word in enumerate(digits.NUMBERS)}
VOCABULARY |= {other: VOCABULARY[word] for other, word in (("number", "digit"), ("background", "paper"))}
SIZE = len(_WORDS) + 3
_TOKEN = re.compile(r"[a-z]+|\d|,")
_GROUP_WEIGHT = re.compile(r"(.+):\s*([-+]?\d*\.?\d+)\s*", re.DOTALL)


def weighted_spans(prompt: str, weight: float = 1.0) -> list[tuple[str, float]]:
    """(text, weight) spans of a prompt, in ComfyUI's notation: (a) times 1.1, (a:1.3) sets 1.3, \\( is a bracket."""
    spans: list[tuple[str, float]] = []
    depth, begin, skip = 0, 0, False
    for i, char in enumerate(prompt):
        if skip or char not in "\\()":
            skip = False
        elif char == "\\":
            skip = prompt[i + 1 : i + 2] in ("(", ")")
        elif char == "(":
            if depth == 0:
                spans.append((prompt[begin:i], weight))
                begin = i + 1
            depth += 1
        elif depth == 1:
            inner = prompt[begin:i]
            explicit = _GROUP_WEIGHT.fullmatch(inner)
            inside = (explicit[1], float(explicit[2])) if explicit else (inner, weight * 1.1)
            spans += weighted_spans(*inside)
            depth, begin = 0, i + 1
        elif depth:
            depth -= 1
    spans.append((prompt[begin:], weight))
    return [(text, value) for text, value in spans if text]


class WordTokenizer:
    """Words to ids; words it does not know become one "unknown" token, and words beyond the length are dropped."""

    def encode(self, text: str) -> tuple[list[int], list[float]]:
        """Ids and weights of a prompt, both of LENGTH."""
        ids, weights = [START], [1.0]
        for span, weight in weighted_spans(text):
            for word in _TOKEN.findall(span.lower()):
                ids.append(VOCABULARY.get(word, UNKNOWN))
                weights.append(weight)
        gap = LENGTH - len(ids)
        return (ids + [PAD] * gap)[:LENGTH], (weights + [1.0] * gap)[:LENGTH]

    def batch(self, texts: list[str]) -> torch.Tensor:
        """Ids (B, LENGTH) of prompts, weights left out (training captions have none)."""
        return torch.tensor([self.encode(text)[0] for text in texts])


class TextEncoder(nn.Module):
    """One pre-norm Transformer block over word and position embeddings.

    ids (B, 16) -> token states (B, 16, 128) and a pooled state (B, 128) read at the start token.
    """

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(SIZE, WIDTH)
        self.positions = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        self.norm_attention = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm_mlp = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.norm_tokens = nn.LayerNorm(WIDTH)
        self.pool = nn.Linear(WIDTH, WIDTH)
        self.norm_pooled = nn.LayerNorm(WIDTH)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids (B, 16) -> (B, 16, 128), (B, 128)."""
        x = self.words(ids) + self.positions
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm_mlp(x))))
        tokens = self.norm_tokens(x)
        return tokens, self.norm_pooled(self.pool(tokens[:, 0]))

    def encode(self, ids: list[int], weights: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """One prompt's ids and weights, from the tokenizer -> (1, 16, 128) weighted states, (1, 128) pooled."""
        empty = [START] + [PAD] * (LENGTH - 1)
        tokens, pooled = self(torch.tensor([ids, empty], device=self.positions.device))
        weight = torch.tensor(weights, device=tokens.device, dtype=tokens.dtype)[:, None]
        # Only weighted tokens are recomputed, so that a plain prompt is untouched to the bit.
        moved = torch.where(weight == 1, tokens[0], tokens[1] + (tokens[0] - tokens[1]) * weight)
        return moved[None], pooled[:1]
