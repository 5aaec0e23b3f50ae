"""The embedded captioner: what it says of clean and damaged digits it never saw, and what it does not accept."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sklearn")

from retort.models import captioner, digits
from retort.restoration.spoil import Spoiling


@pytest.fixture(scope="module")
def batch():
    fields, labels = digits.load("held_out")
    return digits.draw(fields[:96], labels[:96], torch.Generator().manual_seed(9))


def named(batch):
    return {"digit": batch.digit, "ink": batch.ink, "paper": batch.paper}


def test_clean_digits_are_read_rightly_and_said_in_the_prompts_words(batch):
    reader, images = captioner.load(), batch.image.movedim(1, -1)
    found = reader.probabilities(images)
    for name, truth in named(batch).items():
        torch.testing.assert_close(found[name].sum(1), torch.ones(len(truth)))
        assert float((found[name].argmax(1) == truth).float().mean()) > 0.9, name
    said = reader.caption(images)
    right = [
        text == captioner.phrase(digits.NUMBERS[d], digits.COLOURS[i], digits.COLOURS[p])
        for text, d, i, p in zip(said, *(v.tolist() for v in named(batch).values()), strict=True)
    ]
    assert sum(right) > 0.85 * len(right)


def test_damaged_ones_are_read_better_than_by_chance(batch):
    damaged = Spoiling("real_world", 1.0, 1.0, 4.0, 4.0)(batch.image.movedim(1, -1), range(96))
    found = captioner.load().probabilities(damaged)
    assert float((found["paper"].argmax(1) == batch.paper).float().mean()) > 0.8
    assert float((found["digit"].argmax(1) == batch.digit).float().mean()) > 0.4


def test_any_size_is_read(batch):
    images = torch.nn.functional.interpolate(batch.image[:8], size=(193, 161), mode="bicubic").clamp(0, 1)
    found = captioner.load().probabilities(images.movedim(1, -1))
    assert float((found["digit"].argmax(1) == batch.digit[:8]).float().mean()) > 0.7
    assert len(captioner.load().caption(torch.rand(1, 1, 1, 3))) == 1


def test_unlikely_words_are_left_out():
    assert captioner.phrase("seven", "blue", "yellow") == "a blue seven on yellow paper"
    assert captioner.phrase("eight", None, "white") == "an eight on white paper"
    assert captioner.phrase(None, None, None) == "a digit"
    assert captioner.load(0.999).caption(torch.full((1, 64, 64, 3), 0.5)) == ["a digit"]


@pytest.mark.parametrize("shape", [(64, 64, 3), (1, 64, 64, 4), (0, 64, 64, 3)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="images have shape"):
        captioner.load().probabilities(torch.zeros(shape))


@pytest.mark.parametrize("least", [-0.1, 1.0, float("nan")])
def test_what_is_no_probability_is_refused(least):
    with pytest.raises(ValueError, match="least is"):
        captioner.Captioner(torch.nn.Identity(), least)
