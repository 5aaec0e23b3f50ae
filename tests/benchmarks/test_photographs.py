"""The benchmark of photographs: its measures on known pictures, and that its parts fill a report."""

from __future__ import annotations

import argparse

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("skimage")

from retort.benchmarks import photographs
from retort.benchmarks.report import Report
from retort.models import loader


def test_a_picture_that_is_the_clean_one_is_at_no_distance():
    clean = torch.rand(1, 48, 40, 3, generator=torch.Generator().manual_seed(0))
    found = photographs.measured(clean, clean, loader.load_photo_eye(), 1.0)
    assert found.psnr == float("inf") and found.ssim == pytest.approx(1) and found.distance == 0
    assert found.seconds == pytest.approx(1e6 / 48 / 40)


def test_the_best_classical_row_is_each_measures_best():
    low = photographs.Measured(20.0, 0.5, 0.1, 0.2, 0.9, 7.0)
    high = photographs.Measured(30.0, 0.4, 0.3, 0.8, 0.1, 1.0)
    assert photographs.best({"a": low, "b": high}) == photographs.Measured(30.0, 0.5, 0.1, 0.8, 0.1, 7.0)


def test_its_parts_fill_a_report(monkeypatch, tmp_path):
    ways = dict(photographs.classical())
    assert len(ways) == 8
    monkeypatch.setattr(photographs, "classical", lambda: iter([("bilateral", ways["unsharp mask"])]))
    monkeypatch.setattr(photographs, "SETTINGS", {"x2": (2.0, 0.5)})
    report = Report("photographs")
    shown = photographs.evaluated(report, argparse.Namespace(quick=True, work=tmp_path))
    assert list(shown) == ["bicubic", "restored in one call", "the photograph"]
    assert all(len(row) == 4 and row[0].size == row[1].size for row in shown.values())
    value = {name: figure.value for name, figure in report.figures.items()}
    assert value["x2, restored: psnr"] > value["x2, bicubic: psnr"]
    assert value["x2: distance restored over bicubic"] == pytest.approx(
        value["x2, restored: distance"] / value["x2, bicubic: distance"]
    )
