"""The benchmark of restoration: what it damages and asks, what it reads, and that its parts fill a report."""

from __future__ import annotations

import argparse

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("sklearn")

from retort.benchmarks import restoration
from retort.benchmarks.report import Report
from retort.models import digits


@pytest.fixture(scope="module")
def rows():
    return restoration.harmed(restoration.STRENGTHS["medium"], 24)


def test_captions_are_true_wrong_read_and_none(rows):
    for true, wrong, shows in zip(rows.captions["true"], rows.captions["wrong"], rows.shows.tolist(), strict=True):
        digit, ink, paper = digits.NUMBERS[shows[0]], digits.COLOURS[shows[1]], digits.COLOURS[shows[2]]
        assert true.split(" ", 1)[1] == f"{ink} {digit} on {paper} paper"
        assert digit not in wrong
    assert set(rows.captions["none"]) == {""} and all(rows.captions["own"])


def test_the_same_pictures_are_damaged_alike_and_others_on_training_digits(rows):
    again = restoration.harmed(restoration.STRENGTHS["medium"], 24)
    assert torch.equal(again.damaged, rows.damaged) and again.captions == rows.captions
    assert not torch.equal(restoration.harmed(restoration.STRENGTHS["medium"], 24, "train").clean, rows.clean)


def test_clean_digits_are_read_and_the_restorer_helps(rows):
    assert restoration.read(rows.clean, rows).digit > 0.9
    ways = restoration.Restorers(restoration.Path("nowhere"))
    assert list(ways.networks) == ["one step"]
    with torch.inference_mode():
        parts = restoration.batches(rows.damaged, rows.captions["true"])
        made = torch.cat([ways.once("one step", *part) for part in parts])
    assert restoration.read(made, rows).digit > restoration.read(rows.damaged, rows).digit
    assert restoration.read(made, rows).psnr > restoration.read(rows.damaged, rows).psnr


def test_its_parts_fill_a_report(monkeypatch, tmp_path):
    monkeypatch.setattr(restoration, "STEPS", 2)
    monkeypatch.setattr(restoration, "LEVELS", (0.5,))
    monkeypatch.setattr(restoration, "CFGS", (2.0, 1.0)[:1])
    made = restoration.harmed
    monkeypatch.setattr(restoration, "harmed", lambda spoil, count, *rest: made(spoil, 8, *rest))
    report = Report("restoration")
    sheet = restoration.evaluated(report, argparse.Namespace(quick=True, work=tmp_path))
    assert len(sheet) == 6 and all(len(row) == 8 for row in sheet)
    for name in ("strong, one step: true over own caption", "mild, true caption: one step over 2 steps",
                 "time of one step over 2", "strong, none caption, one step: PSNR"):  # fmt: skip
        assert name in report.figures
