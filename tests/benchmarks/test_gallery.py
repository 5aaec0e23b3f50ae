"""The README's pictures can be drawn anew."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("sklearn")

from PIL import Image

from retort.benchmarks import gallery, preference_runs


@pytest.fixture(autouse=True)
def _few_pairs(monkeypatch):
    monkeypatch.setattr(preference_runs, "PAIRS", 8)


@pytest.mark.parametrize("name", gallery.PICTURES)
def test_a_picture_is_drawn(name, tmp_path, monkeypatch):
    out, work = tmp_path / "pictures", tmp_path / "work"
    monkeypatch.setattr(sys, "argv", ["gallery", "--quick", "--only", name, "--out", str(out), "--work", str(work)])
    gallery.main()
    with Image.open(out / f"{name}.jpg") as image:
        assert image.width > 128 and image.height >= 2 * 158
