"""The readers and routes meet a few of the benchmark's mutants and all of its headers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("peft")

from retort.benchmarks import hostile
from retort.benchmarks.report import Report


def test_every_reader_takes_its_whole_file_and_no_mutant_is_a_fault():
    report = Report("hostile")
    hostile.try_readers(report, 200, seed=7)
    figures = report.figures
    assert not [name for name in figures if name.startswith("refused whole")], figures
    assert figures["files: mutants"].value >= 200
    # No more than a rough bound on the time: the machine may be busy.
    assert all(f.met is not False for name, f in figures.items() if "slowest" not in name), figures


def test_every_route_answers_its_own_page_alone():
    report = Report("hostile")
    hostile.try_routes(report)
    assert report.figures["routes: requests"].value == 24 * 20
    assert report.figures["routes: answered or refused wrongly"].value == 0


def test_a_fault_is_counted(monkeypatch, tmp_path):
    """An exception that is none of ours, a crash of Python's stack included."""

    class Faulty:
        def __init__(self, folder: Path):
            self.file = folder / "file"
            self.file.write_bytes(b'{"a": 1}')

        def readers(self):
            def read():
                if self.file.read_bytes() != b'{"a": 1}':
                    raise RecursionError

            return {"faulty": (self.file, read)}

    monkeypatch.setattr(hostile, "Files", Faulty)
    report = Report("hostile")
    hostile.try_readers(report, 5, seed=1)
    assert report.figures["files: errors that are not ours"].met is False
    assert report.figures["faulty: RecursionError: "].value >= 1


def test_mutants_are_drawn_by_a_seed():
    first, second, other = (hostile.mutants(b'{"a": 1, "b": [2]}', random.Random(seed)) for seed in (1, 1, 2))
    drawn = [[next(made) for _ in range(20)] for made in (first, second, other)]
    assert drawn[0] == drawn[1] != drawn[2]
