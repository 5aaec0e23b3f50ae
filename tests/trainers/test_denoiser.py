"""Which of a block's outputs a discriminator sees: the image's, whatever the text's length and place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from retort.sampling.path import FLOW
from retort.sampling.schedule import FlowSchedule
from retort.trainers.adapters import LoraConfig
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


def test_blocks_without_a_row_for_each_sample_are_no_features():
    """Patches for samples (PiD's pixel blocks), a block that is never called, and tokens of a batch in one row."""
    from retort.trainers import features

    x = torch.zeros(2, 4, 8, 8)
    assert features.of(torch.zeros(2 * 16, 9, 6), x) is None
    assert features.of(torch.zeros(5, 6), x) is None
    flat = torch.arange(2 * 16 * 6.0).view(32, 6)
    assert torch.equal(features.of((flat, torch.zeros(9, 6)), x), flat.view(2, 16, 6))

    class Patches(Streams):
        def __init__(self):
            super().__init__("no text")
            self.network["blocks"] = nn.ModuleList(Joint("together") for _ in range(3))
            self.adapters.add("student", LoraConfig(rank=1), 0)

        def call(self, x, sigma, cond):
            blocks = self.network["blocks"]
            made = blocks[0](torch.ones(len(x), 16, 6) + 0 * x.mean(), cond[:, :0])
            patches = made.new_ones(len(x) * 16, 3, 6)  # its samples are patches; the third is never called
            blocks[1](patches, patches[:, :0])
            return x + made.sum() * 0

    denoiser = Patches()
    denoiser.rehearse((4, 8, 8), torch.zeros(1, 3, 6))
    found = denoiser.features(x, torch.ones(2), torch.zeros(2, 3, 6))
    assert [part.shape for part in found] == [(2, 16, 6)]


def test_blocks_that_see_nothing_of_the_latents_are_no_features():
    """Encoders of a text or a lyric beside the network's own blocks (ACE-Step 1.5), as long as a picture's tokens."""

    class Encoded(Streams):
        def __init__(self, told: bool):
            super().__init__("no text")
            self.network["blocks"] = nn.ModuleList(Joint("together") for _ in range(3))
            self.adapters.add("student", LoraConfig(rank=1), 0)
            self.told = told

        def call(self, x, sigma, cond):
            blocks, none = self.network["blocks"], cond[:, :0]
            tokens = x.flatten(2).mT[:, :16, :1].expand(-1, -1, 6) if self.told else torch.ones(len(x), 16, 6)
            made = blocks[0](tokens, none)
            text = blocks[2](blocks[1](torch.ones(len(x), 16, 6), none), none)
            return x + (made.sum() + text.sum()) * 0

    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma, cond = torch.ones(2), torch.zeros(2, 3, 6)
    for told in (True, False):
        denoiser = Encoded(told)
        denoiser.rehearse((4, 8, 8), cond[:1])
        if not told:
            with pytest.raises(ValueError, match="has no list of blocks that see the whole picture"):
                denoiser.features(x, sigma, cond)
            continue
        (seen,) = denoiser.features(x, sigma, cond)
        leaf = x.clone().requires_grad_()
        (again, *_), _ = denoiser.features_and_x0(leaf, sigma, cond)
        assert torch.equal(seen, again) and torch.autograd.grad(again.sum(), leaf)[0].any()
