"""What a page is told of training runs: logs piece by piece, restarts, names that lead elsewhere, commands."""

from __future__ import annotations

import json
import os
import time

import pytest

from retort.hosts import run_view
from retort.trainers.job_watch import COMMANDS_FOLDER, Status, write_status
from retort.trainers.watch import METRICS


def line(step: int, **values) -> str:
    return json.dumps({"step": step, **values}) + "\n"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "mine"
    (folder / "previews").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / METRICS).write_text(line(1, student_loss=0.5, seconds=1.0) + line(2, student_loss=0.25, fake_loss=3))
    (folder / "previews" / "step_0000002.png").write_bytes(b"png")
    (folder / "checkpoints" / "step_0000001.safetensors").write_bytes(b"")
    (folder / "checkpoints" / "step_0000001.safetensors.part").write_bytes(b"")
    return folder


def test_a_log_comes_by_columns_and_piece_by_piece(run):
    first = run_view.log(run, 0, 0)
    assert first["steps"] == [1, 2] and first["restart"] and not first["more"]
    assert first["values"] == {"student_loss": [0.5, 0.25], "fake_loss": [None, 3], "seconds": [1.0, None]}
    assert first["hidden"] == ["seconds"] and first["saves"] == [1] and first["pictures"] == [2]
    with open(run / METRICS, "a") as handle:
        handle.write(line(3, student_loss=None) + '{"step": 4, "stu')
    more = run_view.log(run, first["offset"], 2)
    # A line that is being written is for the next look.
    assert more["steps"] == [3] and not more["restart"] and more["values"] == {}
    with open(run / METRICS, "a") as handle:
        handle.write('dent_loss": 1}\n')
    assert run_view.log(run, more["offset"], 3)["steps"] == [4]


def test_a_log_that_was_cut_begins_anew(run):
    first = run_view.log(run, 0, 0)
    (run / METRICS).write_text(line(1, student_loss=0.5))
    assert run_view.log(run, first["offset"], 2)["restart"]
    # As long as before, but with other steps.
    (run / METRICS).write_text(line(1, student_loss=0.5, seconds=1.0) + line(9, student_loss=0.25, fake_loss=3))
    again = run_view.log(run, first["offset"], 2)
    assert again["restart"] and again["steps"] == [1, 9]


def test_a_long_log_comes_in_parts(run, monkeypatch):
    monkeypatch.setattr(run_view, "CHUNK", 200)
    (run / METRICS).write_text("".join(line(i, student_loss=float(i)) for i in range(1, 51)))
    steps, offset, more = [], 0, True
    while more:
        part = run_view.log(run, offset, steps[-1] if steps else 0)
        steps, offset, more = steps + part["steps"], part["offset"], part["more"]
    assert steps == list(range(1, 51))


def test_lines_of_rubbish_are_left_out(run):
    (run / METRICS).write_bytes(b'\xff\xfe\n[1]\n{"step": "x"}\n' + b"[" * 5000 + b"\n" + line(7, a=True, b=2).encode())
    found = run_view.log(run, 0, 0)
    assert found["steps"] == [7] and found["values"] == {"b": [2]}


def test_runs_with_and_without_a_status(run):
    (run / "config.json").write_text(json.dumps({"method": "dpo", "training": {"steps": 9}}))
    (run.parent / "empty").mkdir()
    (listed,) = run_view.runs(run.parent)
    assert (listed["name"], listed["state"], listed["step"], listed["steps"]) == ("mine", "stopped", 2, 9)
    write_status(run, Status("running", step=2, steps=9, rate=1.5, pid=os.getpid(), machine=os.uname().nodename))
    (listed,) = run_view.runs(run.parent)
    assert (listed["state"], listed["rate"], listed["method"], listed["timesteps"]) == ("running", 1.5, "dpo", [])
    (run / "result.json").write_text(json.dumps({"file": "mine.safetensors", "timesteps": [1000, "x"]}))
    (run / "status.json").write_text('{"state": "on fire"}')
    (listed,) = run_view.runs(run.parent)
    assert listed["state"] == "failed" and "on fire" in listed["message"] and listed["timesteps"] == [1000]
    assert run_view.runs(run.parent / "nothing") == []


def test_names_stay_in_their_folder(run, tmp_path):
    for name in ("../runs", "..", "a/b", "", "C:\\x", "x" * 300, "mine\0"):
        with pytest.raises(ValueError, match="cannot be a file's name"):
            run_view.run_folder(run.parent, name)
    with pytest.raises(FileNotFoundError, match="no run called 'other'"):
        run_view.run_folder(run.parent, "other")
    (tmp_path / "elsewhere").mkdir()
    (run.parent / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="link to another place"):
        run_view.run_folder(run.parent, "link")
    for name in ("../config.json", "step_1.png/../../x", "step_.png", "step_0000002.jpg"):
        with pytest.raises(ValueError, match="no preview's name"):
            run_view.picture(run, name)
    (run / "previews" / "step_0000003.png").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"step_0000003\.png is a link"):
        run_view.picture(run, "step_0000003.png")
    with pytest.raises(FileNotFoundError, match="no picture step_0000004"):
        run_view.picture(run, "step_0000004.png")
    assert run_view.picture(run, "step_0000002.png").read_bytes() == b"png"


def test_commands_go_to_a_run_that_goes_on(run):
    write_status(run, Status("finished", step=9, steps=9))
    with pytest.raises(ValueError, match="does not go on"):
        run_view.command(run, "stop")
    write_status(run, Status("running", pid=os.getpid(), machine=os.uname().nodename, time=time.time()))
    with pytest.raises(ValueError, match="not known"):
        run_view.command(run, "../../x")
    run_view.command(run, "sample")
    assert [path.name for path in (run / COMMANDS_FOLDER).iterdir()] == ["sample"]
