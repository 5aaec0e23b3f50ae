"""The GPU's benchmark without a GPU: rows are kept whatever becomes of others, and the section takes its own place."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from retort.benchmarks import gpu
from retort.benchmarks.gpu_rows import Row

CARD = {
    "device": "A Card", "memory": 24 * 2**30, "torch": "2.9", "comfyui": "0.33.0", "driver": "555.1", "bandwidth": 1e9,
}  # fmt: skip
MEASURED = {
    "seconds": 2.0,
    "peak": 3 * 2**30,
    "reserved": 0,
    "blocks": 0,
    "of": 4,
    "stall": 0.0,
    "copied": 0.0,
    "estimate": 3 * 2**30,
}
# Stands in for the process that measures: what becomes of a row is in its method's name.
CHILD = """
import json, os, sys, time
request = json.loads(sys.argv[-1])
def say(line): print(json.dumps(line), flush=True)
print("a library's greeting", flush=True)
if request["rows"][0][1]["method"] == "does not start":
    raise SystemExit("no such checkout")
say({"card": CARD})
for number, row in request["rows"]:
    say({"begun": number})
    if row["method"] == "killed": print("out of host memory", file=sys.stderr, flush=True); os._exit(9)
    if row["method"] == "hangs": time.sleep(60)
    if row["method"] == "fails": say({"row": number, "failed": "OutOfMemoryError: 40 GB"})
    else: say({"row": number, **MEASURED})
"""


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """bench(methods by process) -> a Bench whose processes are CHILD."""
    started = subprocess.Popen
    child = CHILD.replace("CARD", repr(CARD)).replace("MEASURED", repr(MEASURED))

    def instead(command, **options):
        return started([sys.executable, "-c", child, command[-1]], **options)

    monkeypatch.setattr(gpu.subprocess, "Popen", instead)

    def make(*processes, minutes=1.0):
        rows = [[Row("training", "SDXL", method) for method in methods] for methods in processes]
        return gpu.Bench(tmp_path, False, minutes, rows)

    return make


def test_rows_are_kept_whatever_becomes_of_others(bench):
    one = bench(["flow", "fails", "killed", "dmd2"], ["does not start", "tdm"], ["dpo"])
    over = [row.method for row in one.run()]
    assert over == ["flow", "fails", "killed", "dmd2", "does not start", "tdm", "dpo"]
    assert [one.rows[number].method for number in one.found] == ["flow", "dmd2", "dpo"]
    why = {one.rows[number].method: reason for number, reason in one.missing.items()}
    assert why["fails"] == "OutOfMemoryError: 40 GB"
    assert "out of host memory" in why["killed"]
    assert "no such checkout" in why["does not start"] and why["tdm"] == why["does not start"]
    text = gpu.section(one)
    assert "A Card (24 GB), driver 555.1, torch 2.9, ComfyUI 0.33.0" in text
    assert "| SDXL | dmd2 | resident | 2.00 s |" in text and "* SDXL, killed, resident: its process ended" in text


def test_a_row_that_takes_too_long_costs_itself_alone(bench, monkeypatch):
    monkeypatch.setattr(gpu, "ROW", 1.0)
    one = bench(["flow", "hangs", "dmd2"])
    began = time.monotonic()
    list(one.run())
    assert time.monotonic() - began < 30
    assert len(one.found) == 2 and "took more than 1 seconds" in one.missing[1]


def test_the_time_for_all_is_kept(bench):
    one = bench(["hangs", "flow"], ["dmd2"], minutes=0.05)
    began = time.monotonic()
    list(one.run())
    assert time.monotonic() - began < 20
    assert not one.found and set(one.missing.values()) == {"the time was over"}


def test_streamed_rows_are_compared_with_resident_ones(bench):
    one = bench([])
    rows = [Row("training", "SDXL", "flow", streamed) for streamed in (True, False)]
    one.rows, one.missing, one.card = rows, {}, CARD
    one.found = {
        0: MEASURED | {"seconds": 2.5, "blocks": 4, "copied": 4e9, "stall": 1.0},  # 4 s of copies, 1 of them waited for
        1: MEASURED,
    }
    figures = gpu.figures(one)
    assert figures["SDXL, flow, streamed: transfer hidden"].value == pytest.approx(75)
    assert figures["SDXL, flow, streamed: a step over resident"].value == 1.25
    assert "| streamed | 2.50 s | 1.25 | 3.00 GB | 1.000 |  | 4 | 75 % |" in gpu.section(one)
    assert gpu.hidden(MEASURED, 1e9) == 1 and gpu.hidden({"copied": 1e9, "stall": 9}, 1e9) == 0


def test_the_section_takes_its_own_place(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text("# Results\n\n## Sampling\n\nfast\n", encoding="utf-8")
    gpu.put(path, f"{gpu.TITLE}\n\nnothing yet\n")
    path.write_text(path.read_text(encoding="utf-8") + "\n## Last\n\nword\n", encoding="utf-8")
    gpu.put(path, f"{gpu.TITLE}\n\nmuch\n")
    assert path.read_text(encoding="utf-8") == (
        f"# Results\n\n## Sampling\n\nfast\n\n{gpu.TITLE}\n\nmuch\n\n## Last\n\nword\n"
    )


def test_what_matters_most_comes_first():
    names = [str(row) for group in gpu.groups() for row in group]
    assert len(names) == len(set(names)) == 3 * 4 * 2 + 2 + 8
    assert names.index("Z-Image, dmd2, resident") < names.index("SDXL, DTS*") < names.index("SDXL, tdm, streamed")


def test_one_command_prints_writes_and_keeps(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "groups", lambda: [[Row("training", "SDXL", "flow"), Row("training", "SDXL", "fails")]])
    files = {"--results": tmp_path / "results.md", "--json": tmp_path / "figures.json"}
    given = [str(part) for pair in files.items() for part in pair]
    monkeypatch.setattr("sys.argv", ["gpu", "--comfyui", str(tmp_path), "--small", *given])
    gpu.main()
    assert "SDXL, fails, resident: OutOfMemoryError" in capsys.readouterr().out
    assert json.loads(files["--json"].read_text())["figures"]["SDXL, flow, resident: a step"]["value"] == 2
    assert "| SDXL | flow | resident |" in files["--results"].read_text(encoding="utf-8")
