"""The photograph model: a small convolutional flow-matching network on pixels, and its bag-of-words text encoder.

The latent is the picture itself, 2 p - 1, as of ComfyUI's pixel-space VAE. Nothing looks further than the convolutions
reach (normalisation is per pixel), so a tile's middle is what the whole picture would give there.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .text import weighted_spans

CHANNELS = 3
PATCH = 4  # pixels a side that the first layer sees as one
STRIDE = 2 * PATCH  # of the coarsest features: tiles that begin at its multiples are cut as the whole picture is
WIDTHS = (96, 160)
BLOCKS = (3, 3, 3)  # before, at and after the coarse level
EMBEDDED = 256
WIDTH = 128  # of the text
LENGTH = 24

# Words that captions of the training photographs use; the list is kept in this order for ever.
WORDS = (
    "photograph", "colour", "black", "white", "sharp", "a", "the", "of", "and", "in", "on", "with",
    "woman", "man", "face", "people", "cloth", "animal", "fur", "flower", "leaves", "grass", "tree", "stones", "wall",
    "bricks", "coins", "metal", "machine", "wood", "building", "roof", "water", "sky", "night", "stars", "moon",
    "text", "paper", "handwriting", "tissue", "cells", "eye", "red", "orange", "yellow", "green", "blue", "brown",
    "grey", "dark", "bright",
)  # fmt: skip
PAD, START, UNKNOWN = 0, 1, 2
VOCABULARY = {word: i + 3 for i, word in enumerate(WORDS)}


class PhotoTokenizer:
    """Words to ids; unknown words become one token, words beyond the length are dropped. As `text.WordTokenizer`."""

    def encode(self, prompt: str) -> tuple[list[int], list[float]]:
        """Ids and weights of a prompt in ComfyUI's notation, both of LENGTH."""
        ids, weights = [START], [1.0]
        for span, weight in weighted_spans(prompt):
            for word in re.findall(r"[a-z]+", span.lower()):
                ids.append(VOCABULARY.get(word, UNKNOWN))
                weights.append(weight)
        gap = LENGTH - len(ids)
        return (ids + [PAD] * gap)[:LENGTH], (weights + [1.0] * gap)[:LENGTH]


class PhotoText(nn.Module):
    """Word vectors (1, LENGTH, WIDTH), and their mean (1, WIDTH), which is all that the network is told."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(len(WORDS) + 3, WIDTH)
        nn.init.normal_(self.words.weight, std=0.5)

    def forward(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """ids and weights (B, LENGTH) -> (B, LENGTH, WIDTH), (B, WIDTH)."""
        tokens = self.words(ids) * ((ids != PAD) * weights)[..., None]
        return tokens, tokens.sum(1) / (ids != PAD).sum(1, keepdim=True).sqrt()

    def encode(self, ids: list[int], weights: list[float]) -> tuple[Tensor, Tensor]:
        """One prompt, from the tokenizer -> (1, LENGTH, WIDTH), (1, WIDTH)."""
        device = self.words.weight.device
        return self(torch.tensor([ids], device=device), torch.tensor([weights], device=device))


def _normed(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)


class Block(nn.Module):
    """Two convolutions beside an identity; time and caption scale and shift what enters."""

    def __init__(self, width: int, operations: Any, **where: Any):
        super().__init__()
        self.told = operations.Linear(EMBEDDED, 2 * width, **where)
        self.first = operations.Conv2d(width, width, 3, padding=1, **where)
        self.second = operations.Conv2d(width, width, 3, padding=1, **where)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        """x (B, C, h, w), told (B, EMBEDDED) -> (B, C, h, w)."""
        scale, shift = self.told(told)[..., None, None].chunk(2, 1)
        return x + self.second(F.gelu(self.first(_normed(x) * (1 + scale) + shift), approximate="tanh"))


class PhotoNetwork(nn.Module):
    """x (B, 3, H, W) at timesteps (B,) in 0 .. 1000 with a pooled caption (B, 128) -> velocity, noise minus x0.

    operations: where layers come from (torch.nn, or ComfyUI's). Any H, W from 1 on: borders are repeated inside.
    """

    def __init__(self, operations: Any = nn, dtype: torch.dtype | None = None, device: Any = None):
        super().__init__()
        self.dtype = dtype or torch.float32
        where = {"dtype": dtype, "device": device}
        fine, coarse = WIDTHS
        pixels = CHANNELS * PATCH**2
        self.time = nn.Sequential(
            operations.Linear(WIDTH, EMBEDDED, **where), nn.SiLU(), operations.Linear(EMBEDDED, EMBEDDED, **where)
        )
        self.caption = operations.Linear(WIDTH, EMBEDDED, **where)
        self.enter = operations.Conv2d(pixels, fine, 3, padding=1, **where)
        self.before = nn.ModuleList([Block(fine, operations, **where) for _ in range(BLOCKS[0])])
        self.down = operations.Conv2d(fine, coarse, 2, stride=2, **where)
        self.middle = nn.ModuleList([Block(coarse, operations, **where) for _ in range(BLOCKS[1])])
        self.up = operations.Conv2d(coarse, 4 * fine, 1, **where)
        self.after = nn.ModuleList([Block(fine, operations, **where) for _ in range(BLOCKS[2])])
        self.leave = operations.Conv2d(fine + pixels, pixels, 3, padding=1, **where)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor) -> Tensor:
        """See the class; y of one row serves all."""
        height, width = x.shape[-2:]
        pixels = F.pixel_unshuffle(F.pad(x, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate"), PATCH)
        rates = torch.exp(-math.log(10000) * torch.arange(WIDTH // 2, device=x.device) / (WIDTH // 2))
        angles = timesteps.float()[:, None] * rates
        told = F.silu(self.time(torch.cat([angles.cos(), angles.sin()], 1).to(x.dtype)) + self.caption(y.to(x.dtype)))
        fine = self.enter(pixels)
        for block in self.before:
            fine = block(fine, told)
        coarse = self.down(fine)
        for block in self.middle:
            coarse = block(coarse, told)
        fine = fine + F.pixel_shuffle(self.up(coarse), 2)
        for block in self.after:
            fine = block(fine, told)
        out = F.pixel_shuffle(self.leave(torch.cat([_normed(fine), pixels], 1)), PATCH)
        return out[..., :height, :width]


def new_network() -> PhotoNetwork:
    """A network as training begins: every block is an identity, every prediction 0."""
    network = PhotoNetwork()
    for name, module in network.named_modules():
        if name == "leave" or name.endswith((".second", ".told")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return network
