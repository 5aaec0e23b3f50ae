"""Damage that is drawn anew: it is its seed's alone, stays within what was asked, and keeps the size."""

from __future__ import annotations

import pytest
import torch

from retort.restoration.degradation import Face, Infrared, RealWorld
from retort.restoration.spoil import Spoiling, enlarged


def pictures(count=3, height=48, width=40):
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["real_world", "face", "infrared"])
def test_a_picture_is_damaged_by_its_own_seed_alone(kind):
    spoil, images = Spoiling(kind), pictures()
    together = spoil(images, [5, 6, 7])
    assert together.shape == images.shape and float(together.min()) >= 0 and float(together.max()) <= 1
    torch.testing.assert_close(spoil(images[1:2], [6]), together[1:2], rtol=0, atol=0)
    assert not torch.equal(spoil(images[1:2], [8]), together[1:2])


def test_strength_and_size_are_drawn_between_what_was_asked():
    shrinks = [Spoiling("infrared", least=2, most=8).drawn(seed).shrink for seed in range(400)]
    assert all(isinstance(one, float) and 2 <= one <= 8 for one in shrinks)
    # Even over factors as over their inverses: half of them below the geometric mean.
    assert 0.42 < sum(one < 4 for one in shrinks) / 400 < 0.58
    fixed = Spoiling("real_world", 0.5, 0.5, 3.0, 3.0)
    assert fixed.drawn(1) == fixed.drawn(2) == RealWorld(shrink=3.0, strength=0.5)
    assert isinstance(Spoiling("face").drawn(0), Face) and isinstance(Spoiling("infrared").drawn(0), Infrared)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"degradation": "rain"}, "degradation must be one of real_world, face, infrared, got 'rain'"),
        ({"weakest": 0.9, "strongest": 0.2}, "weakest is 0.9 and strongest 0.2"),
        ({"strongest": 1.5}, "strongest must be between 0 and 1, got 1.5"),
        ({"least": 0.5}, "least must be between 1 and 64"),
        ({"most": float("inf")}, "most must be between 1 and 64"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Spoiling(**given)


def test_what_has_its_size_is_left_as_it_is():
    images = pictures()
    assert enlarged(images, 48, 40) is images
    assert enlarged(images, 96, 81).shape == (3, 96, 81, 3)
