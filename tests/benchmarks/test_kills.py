"""Killed runs go on to the same LoRA: a few kills of the benchmark's fifty."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from retort.benchmarks import kills
from retort.benchmarks.report import Report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="processes are forked"),
]


def test_what_is_killed_at_each_kind_of_moment_comes_to_the_same():
    report = Report("kills")
    kills.kills(report, 3, ("flow",))
    # A kill while status.json is written may leave a temporary file of it, which the next process must not touch.
    assert all(f.met is not False for name, f in report.figures.items() if "that stay" not in name), report.figures
    assert all(report.figures[f"processes: killed {moment}"].value == 1 for moment in kills.MOMENTS)


def test_a_lora_that_differs_is_told(tmp_path):
    """What compares would notice: one number, a step that is told twice."""
    import json

    import torch
    from safetensors.torch import save_file

    loras = tmp_path / "loras"
    loras.mkdir()
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 1.0 + 2**-20)):
        save_file({"x": torch.tensor([value])}, loras / f"{name}.safetensors")
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps({"file": f"{name}.safetensors"}))
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    whole, other = tmp_path / "a", tmp_path / "b"
    assert kills.equal(other, whole, loras, 2) and not kills.equal(tmp_path / "c", whole, loras, 2)
    (other / "metrics.jsonl").write_text('{"step": 1}\n{"step": 1}\n{"step": 2}\n')
    assert not kills.equal(other, whole, loras, 2)
