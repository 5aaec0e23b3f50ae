"""Which of a block's outputs a discriminator sees: the image's, whatever the text's length and place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from retort.sampling.path import FLOW
from retort.sampling.schedule import FlowSchedule
from retort.trainers.denoiser import Denoiser


class Joint(nn.Module):
    """A block that returns its two streams in either order, one at a time, or as one."""

    def __init__(self, order: str):
        super().__init__()
        self.order, self.first, self.second = order, nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, image, text):
        """(B, N, 6) and (B, L, 6)."""
        return {
            "text first": (text, image), "image first": (image, text), "no text": (None, image),
            "together": torch.cat([text, image], 1),
        }[self.order]  # fmt: skip


class Streams(Denoiser):
    """Patches of 2 x 2; cond is the text (B, L, 6), zeros, where the image is all ones."""

    def __init__(self, order: str):
        network = nn.ModuleDict({"blocks": nn.ModuleList([Joint(order)])})
        super().__init__(network, FLOW, FlowSchedule(), "flow", torch.device("cpu"))

    def call(self, x, sigma, cond):
        """x itself."""
        patches = x.shape[2] * x.shape[3] // 4
        self.network["blocks"][0](torch.ones(len(x), patches, 6), cond)
        return x


@pytest.mark.parametrize("order", ["text first", "image first", "no text"])
@pytest.mark.parametrize("length", [3, 16, 77])
def test_the_image_is_found(order, length):
    if length == 16 and order == "image first":
        length = 17  # of equal length and the other way round nothing tells them apart
    x, sigma = torch.zeros(2, 4, 8, 8), torch.ones(2)
    (seen,) = Streams(order).features(x, sigma, torch.zeros(2, length, 6))
    assert seen.shape == (2, 16, 6) and bool(seen.all())


def test_streams_in_one_are_seen_as_they_are():
    (seen,) = Streams("together").features(torch.zeros(1, 4, 8, 8), torch.ones(1), torch.zeros(1, 5, 6))
    assert seen.shape == (1, 21, 6)
