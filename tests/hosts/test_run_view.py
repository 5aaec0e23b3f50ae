"""What a page is told of training runs: logs piece by piece, restarts, names that lead elsewhere, commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import fields

import pytest

from retort.hosts.jobs import view as run_view
from retort.trainers.job_watch import COMMANDS_FOLDER, Status, started, write_status
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


def test_many_names_and_numbers_that_are_none_stay_small(run):
    """A log of few bytes must not become an answer of many."""
    (run / METRICS).write_text("".join(line(i, **{f"k{i}": 1}) for i in range(1, 8001)))
    steps, offset, more = [], 0, True
    while more:
        part = run_view.log(run, offset, steps[-1] if steps else 0)
        assert len(part["values"]) <= 64 and len(json.dumps(part)) < 1_000_000
        steps, offset, more = steps + part["steps"], part["offset"], part["more"]
    assert steps == list(range(1, 8001))
    odd = '{"step": 1, "a": NaN, "b": Infinity, "c": 1e999, "d": HUGE, "e": 5}\n{"step": HUGE, "e": 1}\n{"step": -1}\n'
    (run / METRICS).write_text(odd.replace("HUGE", "9" * 400) + '{"step": 2, "e": ' + "9" * 5000 + "}\n")
    found = run_view.log(run, 0, 0)
    assert found["steps"] == [1] and found["values"] == {"e": [5]}
    json.dumps(found, allow_nan=False)


def test_lines_of_any_length_are_passed(run):
    (run / METRICS).write_bytes(
        b"x" * (run_view.CHUNK + 9) + b"\n" + line(1, a=1).encode() + b"[" * 9000 + b"\n" + line(2, a=2).encode()
    )
    steps, offset, looks = [], 0, 0
    while True:
        part = run_view.log(run, offset, steps[-1] if steps else 0)
        assert not part["restart"] or not offset
        steps, offset, looks = steps + part["steps"], part["offset"], looks + 1
        if not part["more"]:
            break
    assert steps == [1, 2] and looks <= 3 and offset == (run / METRICS).stat().st_size
    # Far behind the last row, nobody can tell which step it was; nothing begins anew for that.
    with open(run / METRICS, "ab") as handle:
        handle.write(b"y" * 5000 + b"\n")
    offset = run_view.log(run, offset, 2)["offset"]
    with open(run / METRICS, "ab") as handle:
        handle.write(line(3).encode())
    part = run_view.log(run, offset, 2)
    assert part["steps"] == [3] and not part["restart"]


def test_a_very_long_log_is_thinned_but_for_its_end(run, monkeypatch):
    for name, value in {"LONG": 20_000, "CHUNK": 4000, "MOST_ROWS": 50}.items():
        monkeypatch.setattr(run_view, name, value)
    (run / METRICS).write_text("".join(line(i, student_loss=float(i)) for i in range(1, 2001)))
    first = run_view.log(run, 0, 0)
    assert first["thinned"] and first["more"] and 45 <= len(first["steps"]) <= 52 and first["steps"][0] == 1
    gaps = {b - a for a, b in zip(first["steps"], first["steps"][1:], strict=False)}
    assert max(gaps) < 50 and sorted(first["steps"]) == first["steps"]
    rest, offset, more = [], first["offset"], True
    while more:
        part = run_view.log(run, offset, (first["steps"] + rest)[-1])
        assert not part["restart"] and not part["thinned"]
        rest, offset, more = rest + part["steps"], part["offset"], part["more"]
    assert rest == list(range(first["steps"][-1] + 1, 2001)) and len(rest) > 80


def test_one_bad_status_breaks_no_list(run):
    """A pid that no system has, and other numbers out of range."""
    for number, status in enumerate(({"pid": 2**40}, {"pid": -1}, {"step": 10**18}, {"rate": 1e300}, {"time": -1})):
        folder = run.parent / f"bad{number}"
        folder.mkdir()
        machine = os.uname().nodename
        (folder / "status.json").write_text(json.dumps({"state": "running", "machine": machine, **status}))
    listed = {one["name"]: one for one in run_view.runs(run.parent)}
    assert len(listed) == 6
    for name, one in listed.items():
        assert name == "mine" or (one["state"] == "failed" and "must be a number from 0 to" in one["message"])


def test_how_previews_are_drawn_is_told_beside_which_is_the_last(run):
    """Both were called preview, and a run that has a status told the file's name alone."""
    objective = {"steps": 14, "cfg": 3.0, "expert": "low noise"}
    (run / "config.json").write_text(json.dumps({"method": "flow", "objective": objective}))
    (run / "status.json").write_text(json.dumps({"state": "finished", "preview": "previews/step_0000002.png"}))
    told = run_view.summary(run)
    assert told["sampling"] == objective and told["preview"] == "previews/step_0000002.png"
    own = {"sampling", "base", "size", "latent", "method", "prompt", "student", "timesteps", "sigmas"}
    assert own <= told.keys() and not own & {each.name for each in fields(Status)}


def test_what_a_file_says_is_cut(run):
    (run / "config.json").write_text(json.dumps({"method": "x" * 10_000, "training": {"steps": "many"}}))
    (run / "result.json").write_text(
        json.dumps({"base": {f"k{i}": "y" * 9000 for i in range(90)}, "timesteps": [1] * 9000})
    )
    assert len(json.dumps(run_view.summary(run))) < 10_000
    for number in range(200):
        folder = run.parent / f"r{number}"
        folder.mkdir()
        (folder / METRICS).write_text(line(1))
        (folder / "status.json").write_text(json.dumps({"state": "failed", "message": "m" * 90_000}))
        (folder / "job.log").write_text("l" * 8000)
    listed = run_view.runs(run.parent)
    assert len(json.dumps(listed)) < 1_000_000 and len(listed) == 200


def test_no_process_of_others_is_waited_for(run):
    """The number in a stranger's file may be that of a child of ComfyUI, whose end ComfyUI itself wants to hear."""
    child = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    write_status(run, Status("running", pid=child.pid, machine=os.uname().nodename))
    run_view.summary(run)
    assert child.wait() == 7
    ours = subprocess.Popen([sys.executable, "-c", "pass"])
    started(ours)
    write_status(run, Status("running", pid=ours.pid, machine=os.uname().nodename))
    os.waitid(os.P_PID, ours.pid, os.WEXITED | os.WNOWAIT)
    assert run_view.summary(run)["state"] == "died"


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


def test_a_page_is_told_of_settings_and_of_the_sheets_layout(run):
    """Settings by their path; the layout as the run wrote it, or as its number of previews makes it."""
    assert run_view.about(run) == {"settings": {}, "sheet": None}
    config = {"method": "dmd2", "objective": {"steps": 4, "timesteps": ""}, "training": {"previews": 8, "ema": None}}
    (run / "config.json").write_text(json.dumps(config))
    found = run_view.about(run)
    assert found["settings"] == {
        "method": "dmd2", "objective.steps": 4, "objective.timesteps": "", "training.previews": 8, "training.ema": None,
    }  # fmt: skip
    assert found["sheet"] == {"columns": 4, "prompts": [""] * 8}
    (run / "previews.json").write_text(json.dumps({"columns": 2, "prompts": ["a", "b", "c"]}))
    assert run_view.about(run)["sheet"] == {"columns": 2, "prompts": ["a", "b", "c"]}


@pytest.mark.parametrize("told", [[], {"columns": 0, "prompts": ["a"]}, {"columns": "x", "prompts": ["a"]},
                                  {"columns": 10**9, "prompts": ["a"]}, {"prompts": ["x" * 10**5] * 2000}])  # fmt: skip
def test_a_strangers_layout_is_bounded(run, told):
    (run / "previews.json").write_text(json.dumps(told))
    (run / "config.json").write_text(json.dumps({"training": {"previews": 10**12}, "x": {"y": {"z": ["w" * 10**4]}}}))
    found = run_view.about(run)
    assert len(json.dumps(found)) < 200_000
    if found["sheet"]:
        assert 1 <= found["sheet"]["columns"] <= len(found["sheet"]["prompts"]) <= 256


def test_a_run_that_copies_pairs_first_has_two_phases(run):
    """The second begins at the first step whose loss is the method's."""
    assert run_view.log(run, 0, 0)["phases"] == []
    (run / "config.json").write_text(json.dumps({"method": "dmd2", "objective": {"regression_steps": 180}}))
    expected = [{"from": 0, "name": "copies pairs"}, {"from": 181, "name": "dmd2"}]
    assert run_view.log(run, 0, 0)["phases"] == expected
    for strange in (True, "9", -1, None, [4]):
        (run / "config.json").write_text(json.dumps({"objective": {"regression_steps": strange}}))
        assert run_view.log(run, 0, 0)["phases"] == []


def test_a_run_says_what_its_student_does_between_its_levels(tmp_path):
    for method, mode in (("dmd2", "renoise"), ("tdm", "deterministic"), ("instarevive", "single"), ("of_tomorrow", "")):
        run = tmp_path / method
        run.mkdir()
        (run / "config.json").write_text(json.dumps({"method": method}))
        assert run_view.summary(run)["mode"] == mode


def test_a_student_s_levels_are_known_before_its_run_ends(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"method": "dmd2"}))
    assert run_view.summary(tmp_path)["sigmas"] == []
    (tmp_path / "student.json").write_text(json.dumps({"sigmas": [0.9375, 0.5, "x"]}))
    assert run_view.summary(tmp_path)["sigmas"] == [0.9375, 0.5]
    (tmp_path / "student.json").unlink()  # of a version before
    (tmp_path / "result.json").write_text(json.dumps({"sigmas": [14.5]}))
    assert run_view.summary(tmp_path)["sigmas"] == [14.5]
