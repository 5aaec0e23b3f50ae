"""Load Edit Pairs: lists in one order, texts of their own, and folders that do not fit, on the headless host."""

from __future__ import annotations

import pytest
import torch

from retort.files.pictures import save_png
from retort.hosts.headless.folders import Folders, use
from retort.nodes.checks import Asked
from retort.nodes.edit_pairs import RetortEditPairs


@pytest.fixture
def place(tmp_path):
    for number, name in enumerate(("c", "a", "b10", "b9")):
        for folder, more in (("before", 0.0), ("after", 0.5)):
            (tmp_path / "edits" / folder).mkdir(parents=True, exist_ok=True)
            picture = torch.full((6 + number, 8, 3), number / 10 + more)
            save_png(picture, tmp_path / "edits" / folder / f"{name}.png")
    (tmp_path / "edits" / "after" / "a.txt").write_text("make it night\n", encoding="utf-8")
    with use(Folders(models=(tmp_path / "models",), inputs=(tmp_path,), output=tmp_path / "out")):
        yield tmp_path / "edits"


def test_each_picture_stands_beside_its_own(place):
    before, after, prompts = RetortEditPairs.execute("edits", "make it bright").args
    assert [tuple(picture.shape) for picture in before] == [(1, n, 8, 3) for n in (7, 8, 9, 6)]  # a, b10, b9, c
    assert [tuple(picture.shape) for picture in after] == [tuple(picture.shape) for picture in before]
    for first, second in zip(before, after, strict=True):
        assert torch.allclose(second - first, torch.full_like(first, 0.5), atol=1.5 / 255)
    assert prompts == ["make it night", *["make it bright"] * 3]


def test_it_runs_again_when_something_has_changed(place):
    def told():
        return RetortEditPairs.fingerprint_inputs(folder="edits", prompt="")

    first = told()
    assert told() == first
    (place / "after" / "c.txt").write_text("a text", encoding="utf-8")
    assert told() != first


def refused(**given):
    with pytest.raises(ValueError) as found:
        RetortEditPairs.check(Asked({"folder": "edits", "prompt": "x", **given}))
    return str(found.value)


def test_what_does_not_fit_is_named(place):
    assert "prompt is empty, and b10.png has no text of its own" in refused(prompt=" ")
    assert "cannot be a file's name" in refused(folder="../edits")
    assert "'none' has no folder 'before'" in refused(folder="none")
    (place / "before" / "c.png").unlink()
    assert "1 pictures of 'edits' are there once: 'c', for one, is in 'after' and not in 'before'" in refused()
    (place / "before" / "c.png").write_bytes((place / "after" / "c.png").read_bytes())
    (place / "before" / "c.jpg").write_bytes(b"x")
    assert "two pictures that differ by their ending alone" in refused()
    for folder in ("before", "after"):
        for file in (place / folder).iterdir():
            file.unlink()
    assert "holds no pictures" in refused()
