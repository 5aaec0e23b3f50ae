"""Captions: lines to images and tiles, and captioners that say nothing or too much."""

from __future__ import annotations

import pytest

from retort.restoration.captions import LONGEST, cleaned, per_image, per_tile


def test_captioners_that_say_nothing_or_too_much():
    lines, cut = cleaned(["", "a\n b\t c ", "x" * 100_000], 3)
    assert lines == ["", "a b c", "x" * LONGEST] and cut == 1
    with pytest.raises(ValueError, match="2 captions for 3"):
        cleaned(["a", "b"], 3)


def test_captions_of_images():
    assert per_image("a red\nthree", 2, each_line=False) == ["a red three"] * 2
    assert per_image("one\ntwo", 2, each_line=True) == ["one", "two"]
    assert per_image("one\n\n", 2, each_line=True) == ["one", ""]
    assert per_image("one\ntwo\n", 2, each_line=True) == ["one", "two"]
    with pytest.raises(ValueError, match="3 lines for 2 images"):
        per_image("a\nb\nc", 2, each_line=True)


def test_captions_of_tiles():
    assert per_tile("a\nb\nc", 2, 3) == [["a", "b", "c"]] * 2
    assert per_tile("a\nb\nc\nd\n\nf", 2, 3) == [["a", "b", "c"], ["d", "", "f"]]
    assert per_tile("a\nb\nc\n", 2, 3) == [["a", "b", "c"]] * 2
    assert per_tile("a\n\n", 1, 3) == [["a", "", ""]]
    with pytest.raises(ValueError, match="2 lines and there are 3 tiles"):
        per_tile("a\nb", 1, 3)
