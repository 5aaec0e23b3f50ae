"""Job folders: a stranger's file is read strictly, a run tells where it stands, and its process hears commands."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from retort.files.atomic import locked
from retort.files.strangers import MOST_BYTES, read_json
from retort.trainers import job_watch, parallel
from retort.trainers.adapters import LoraConfig
from retort.trainers.config import TrainingConfig
from retort.trainers.dataset import Dataset
from retort.trainers.job import DATA, JOB, LOCK, LOG, Job, checked_folder
from retort.trainers.job_watch import FileWatcher, Status, read_status, send, write_status
from retort.trainers.loop import Stopped
from retort.trainers.methods import read_config
from retort.trainers.sources import AppliedLora, Base, Vae

GOOD = {
    "format": 1,
    "name": "mine",
    "started_by": "headless",
    "base": {"kind": "checkpoint", "file": "a/b.safetensors", "shift": 3.0, "loras": [{"file": "x.safetensors"}]},
    "vae": {"kind": "embedded", "variant": "flow"},
    "start": "",
    "method": "flow",
    "objective": {"levels": "logit_normal"},
    "training": {"steps": 7, "learning_rate": 1},
    "lora": {"rank": 3},
}


def dataset(n: int = 3) -> Dataset:
    tokens = torch.randn(1, 4, 6)
    entries = [(tokens, {"pooled_output": torch.randn(1, 6), "width": 64, "note": None}) for _ in range(n)]
    return Dataset(entries, [f"p{i}" for i in range(n)], entries[0], [torch.randn(4, 2, 2) for _ in range(n)])


@pytest.fixture
def folder(tmp_path):
    Job.from_json(GOOD).save(tmp_path / "run", dataset())
    return tmp_path / "run"


def test_a_job_comes_back_as_it_was(folder):
    job = Job.load(folder)
    assert job.base == Base("checkpoint", file="a/b.safetensors", shift=3.0, loras=(AppliedLora("x.safetensors"),))
    assert job.vae == Vae("embedded", "flow")
    assert job.config.training == TrainingConfig(steps=7, learning_rate=1.0) and job.config.lora == LoraConfig(rank=3)
    assert job.config.objective.levels == "logit_normal"
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job and job.other_expert is None
    two = replace(job, other_expert=Base("diffusion_model", file="low.safetensors", loras=(AppliedLora("y.sft"),)))
    assert Job.from_json(json.loads(json.dumps(two.to_json()))) == two
    merged = replace(job, other_expert=Base("merged", file="other_expert.safetensors", shift=5.0))
    assert Job.from_json(json.loads(json.dumps(merged.to_json()))) == merged
    assert checked_folder(folder) == checked_folder(folder / JOB) == folder.resolve()


def changed(**values):
    return {**GOOD, **values}


BAD = [
    ([], "object"),
    ({}, "format is missing"),
    (changed(format=2), "format is 2"),
    (changed(format=True), "format"),
    (changed(code="x"), "code is not part"),
    (changed(comfyui="/tmp/evil"), "comfyui is not part"),
    ({k: v for k, v in GOOD.items() if k != "base"}, "base is missing"),
    ({k: v for k, v in GOOD.items() if k != "method"}, "method is missing"),
    (changed(name="../up"), "name"),
    (changed(name="a/b"), "name"),
    (changed(name=""), "name"),
    (changed(name="x" * 200), "name"),
    (changed(name=7), "name must be a text"),
    (changed(started_by="root"), "started_by"),
    (changed(method="rm"), "method must be one of"),
    (changed(method=["flow"]), "method"),
    (changed(objective=[]), "objective must be an object"),
    (changed(objective={"levels": "x"}), "objective.levels"),
    (changed(objective={"steps": 1.5}), "objective.steps"),
    (changed(training={"steps": 0}), "steps must be between"),
    (changed(training={"steps": 10**12}), "steps must be between"),
    (changed(training={"steps": "7"}), "training.steps must be int"),
    (changed(training={"steps": True}), "training.steps must be int"),
    (changed(training={"learning_rate": -1}), "learning_rate"),
    (changed(training={"batch_size": 10**9}), "batch_size"),
    (changed(training={"resume_from": "x"}), "training.resume_from is not a setting"),
    (changed(lora={"rank": 10**6}), "rank"),
    (changed(lora={"targets": ""}), "targets"),
    (changed(base="flow"), "base must be an object"),
    (changed(base={}), "base.kind is missing"),
    (changed(base={"kind": "hub", "file": "a.safetensors"}), "base.kind"),
    (changed(base={"kind": "checkpoint"}), "base.file is missing"),
    (changed(base={"kind": "checkpoint", "file": "/etc/a.safetensors"}), "leaves its folder"),
    (changed(base={"kind": "checkpoint", "file": "../a.safetensors"}), "leaves its folder"),
    (changed(base={"kind": "checkpoint", "file": "a\\..\\..\\b.safetensors"}), "leaves its folder"),
    (changed(base={"kind": "checkpoint", "file": "C:\\a.safetensors"}), "leaves its folder"),
    (changed(base={"kind": "checkpoint", "file": "\\\\host\\share\\a.safetensors"}), "leaves its folder"),
    (changed(base={"kind": "checkpoint", "file": "~/a.safetensors"}), "leaves its folder"),
    (changed(base={"kind": "checkpoint", "file": "a\0.safetensors"}), "file's name"),
    (changed(base={"kind": "checkpoint", "file": "a.ckpt"}), "no safetensors file"),
    (changed(base={"kind": "checkpoint", "file": "a.safetensors.pt"}), "no safetensors file"),
    (changed(base={"kind": "checkpoint", "file": "a.safetensors", "variant": "flow"}), "does not belong"),
    (changed(base={"kind": "diffusers", "folder": "../x"}), "leaves its folder"),
    (changed(base={"kind": "merged", "file": "other.safetensors"}), "base.file must be"),
    (changed(base={"kind": "embedded", "variant": "flow", "shift": -1.0}), "base.shift"),
    (changed(base={"kind": "embedded", "variant": "flow", "shift": "3"}), "base.shift"),
    (changed(base={"kind": "embedded", "variant": "flow", "loras": {}}), "base.loras must be a list"),
    (changed(base={"kind": "embedded", "variant": "flow", "loras": ["x"]}), "base.loras[0]"),
    (changed(base={"kind": "embedded", "variant": "flow", "loras": [{"file": "/x.safetensors"}]}), "base.loras[0]"),
    (
        changed(base={"kind": "embedded", "variant": "flow", "loras": [{"file": "x.safetensors", "strength": 1e9}]}),
        "strength",
    ),
    (changed(base={"kind": "embedded", "variant": "flow", "loras": [{"file": "x.sft"}] * 99}), "base.loras"),
    (changed(other_expert={"kind": "checkpoint", "file": "../a.safetensors"}), "leaves its folder"),
    (changed(other_expert="flow"), "other_expert must be an object"),
    (changed(other_expert={"kind": "hub"}), "other_expert.kind"),
    (changed(vae={"kind": "vae", "file": "x.pt"}), "vae.file"),
    (changed(vae="x"), "vae must be an object"),
    (changed(start="../x.safetensors"), "start"),
    (changed(method="di_star", objective={"alpha_rew": 2.0}), "a job takes no reward"),
]


@pytest.mark.parametrize(("values", "message"), BAD, ids=range(len(BAD)))
def test_a_strangers_job_is_refused_by_the_field(folder, values, message):
    (folder / JOB).write_text(json.dumps(values))
    with pytest.raises(ValueError) as raised:
        Job.load(folder)
    assert message in str(raised.value) and str(folder / JOB) in str(raised.value)
    assert len(str(raised.value)) < 900


TEXTS = [
    ("", "no JSON"),
    ("{", "no JSON"),
    ('{"a": NaN}', "NaN is no number"),
    ('{"a": 1e999}', "too large"),
    ('{"a": -Infinity}', "no number"),
    ('{"a": 18446744073709551616}', "too large"),
    ('{"a": ' + "9" * 5000 + "}", "too large"),
    ('{"name": 1, "name": 2}', "given twice"),
    ("[" * 100_000, "nested too deep"),
    ('"' + "x" * MOST_BYTES + '"', "larger than"),
    (b"\xfa{}", "UTF-8"),
    (b"PK\x03\x04", "no plain text"),
]


@pytest.mark.parametrize(("text", "message"), TEXTS, ids=range(len(TEXTS)))
def test_what_is_no_plain_json_is_refused(tmp_path, text, message):
    path = tmp_path / JOB
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_json(path)


# ---- data -----------------------------------------------------------------------------------------


def test_a_data_set_comes_back_as_it_was(tmp_path):
    given = dataset()
    given.save(tmp_path / DATA)
    found = Dataset.load(tmp_path / DATA)
    assert found.prompts == given.prompts and found.shape is None
    for (a, x), (b, y) in zip([*found.entries, found.negative], [*given.entries, given.negative], strict=True):
        assert torch.equal(a, b) and x.keys() == y.keys() and x["width"] == 64 and x["note"] is None
    assert all(torch.equal(a, b) for a, b in zip(found.latents, given.latents, strict=True))
    empty = Dataset(given.entries, given.prompts, None, None, (4, 8, 8))
    empty.save(tmp_path / DATA)
    assert Dataset.load(tmp_path / DATA).shape == (4, 8, 8)


def test_pictures_come_back_to_the_byte_and_are_checked(tmp_path):
    given = dataset()
    pictures = [torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8) for _ in given.latents]
    replace(given, pictures=pictures).save(tmp_path / DATA)
    found = Dataset.load(tmp_path / DATA)
    assert all(torch.equal(a, b) for a, b in zip(found.pictures, pictures, strict=True))
    with pytest.raises(ValueError, match="there are 2 pictures for 3 latents"):
        replace(given, pictures=pictures[:2])
    with pytest.raises(ValueError, match=r"picture 0 is \(16, 16, 3\) of torch.float32; give \(H, W, 3\) bytes"):
        replace(given, pictures=[p.float() for p in pictures])


HEADER = {"entries": [0], "negative": None, "prompts": ["a"], "shape": [4, 2, 2], "notes": {}, "latents": None}
HEADERS = [
    "not json",
    "[]",
    "null",
    "[" * 50_000,
    {},
    {**HEADER, "entries": []},
    {**HEADER, "entries": [7]},
    {**HEADER, "entries": ["x"]},
    {**HEADER, "entries": [[0]]},
    {**HEADER, "entries": None},
    {**HEADER, "prompts": ["a", "b"]},
    {**HEADER, "prompts": 3},
    {**HEADER, "shape": [4]},
    {**HEADER, "shape": [10**6, 10**6, 10**6]},
    {**HEADER, "shape": ["a", 1, 1]},
    {**HEADER, "shape": None},
    {**HEADER, "notes": []},
    {**HEADER, "notes": {"0/width": {"x": 1}}},
    {**HEADER, "notes": {"width": 1}},
    {**HEADER, "latents": 10**12},
    {**HEADER, "latents": -1},
    {**HEADER, "latents": 2},
    {**HEADER, "latents": float("inf")},
    {**HEADER, "negative": 9},
]


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_a_strangers_data_set_is_refused(tmp_path, header):
    text = header if isinstance(header, str) else json.dumps(header)
    save_file({"entry/0/tokens": torch.zeros(1, 2, 3)}, tmp_path / DATA, {"retort_dataset": "1", "header": text})
    with pytest.raises(ValueError):
        Dataset.load(tmp_path / DATA)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04pickle", b"\xff" * 64, None], ids=["empty", "zip", "ones", "cut"])
def test_what_is_no_safetensors_file_is_no_data_set(tmp_path, content):
    path = tmp_path / DATA
    dataset().save(path)
    path.write_bytes(path.read_bytes()[:-3] if content is None else content)
    with pytest.raises(ValueError, match="cannot be read"):
        Dataset.load(path)
    with pytest.raises(ValueError, match="cannot be read"):
        Dataset.load(tmp_path / "missing.safetensors")


# ---- status and commands --------------------------------------------------------------------------


def test_what_a_kill_left_of_a_status_is_cleared_and_one_being_written_is_not(folder):
    """Whoever starts a job writes its status too, while the job begins."""
    stale, now = folder / ".status.json.1.part", folder / ".status.json.2.part"
    for part in (stale, now):
        part.write_bytes(b"half")
    os.utime(stale, (time.time() - 2 * job_watch.STALE,) * 2)
    with FileWatcher(folder):
        assert (stale.exists(), now.exists()) == (False, True)


def test_commands_arrive_once_and_a_stop_before_the_first_step_ends_the_run(folder, monkeypatch):
    monkeypatch.setattr(job_watch, "LOOK_EVERY", 0.0)
    with FileWatcher(folder) as watcher:
        assert read_status(folder).state == "running" and watcher.commands() == set()
        send(folder, "save")
        send(folder, "sample")
        assert watcher.commands() == {"save", "sample"} and watcher.commands() == set()
        watcher.step(1, 10, {"student_loss": 1.0})
        send(folder, "stop")
        watcher.check()  # a step has begun: it is finished first
        assert watcher.commands() == {"stop"} == watcher.commands()
        watcher.end("stopped", "enough")
    status = read_status(folder)
    assert (status.state, status.step, status.steps, status.message) == ("stopped", 1, 10, "enough")
    assert status.pid == os.getpid() and status.machine == socket.gethostname()
    with FileWatcher(folder, status) as watcher:
        assert watcher.status.step == 1
        send(folder, "stop")
        with pytest.raises(Stopped):
            watcher.check()
    with FileWatcher(folder) as watcher:
        watcher.ask_to_stop()
        assert watcher.commands() == {"stop"}
    with pytest.raises(ValueError, match="command 'rm' is not known"):
        send(folder, "rm")
    assert not [p for p in (folder / "commands").iterdir()]


def test_the_status_says_how_full_the_card_was(folder):
    """As the step before the last look measured it; a step that measured nothing does not empty the card."""
    with FileWatcher(folder) as watcher:
        watcher.step(1, 10, {"memory": 5e9, "card": 8e9})
        watcher.step(2, 10, {})
        watcher.end("stopped")
    status = read_status(folder)
    assert (status.memory, status.card) == (5_000_000_000, 8_000_000_000)


def test_the_status_is_written_while_a_step_takes_long(folder, monkeypatch):
    monkeypatch.setattr(job_watch, "WRITE_EVERY", 0.01)
    monkeypatch.setattr(job_watch, "BEAT_EVERY", 0.02)
    with FileWatcher(folder) as watcher:
        watcher.step(1, 10, {})
        time.sleep(0.01)
        watcher.step(2, 10, {})
        first = read_status(folder).time
        deadline = time.monotonic() + 120
        while read_status(folder).step < 2 or read_status(folder).time == first:
            assert time.monotonic() < deadline
        found = read_status(folder)
    assert found.rate > 0 and found.eta == pytest.approx(8 / found.rate)
    assert "step 2 of 10" in str(found)


def test_a_process_that_vanished_is_told_from_one_that_works(folder):
    with pytest.raises(ValueError, match="no job that was started"):
        read_status(folder)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    (folder / LOG).write_text("\n".join(f"line {i}" for i in range(100)))
    here = Status("running", step=3, steps=9, pid=child.pid, machine=socket.gethostname())
    write_status(folder, here)
    assert read_status(folder).state == "running"
    # Its number may belong to another process by now: an old sign of life counts only while the lock is held.
    path = folder / "status.json"
    old = {**json.loads(path.read_text()), "time": 1.0}
    path.write_text(json.dumps(old))
    assert read_status(folder).state == "died"
    with locked(folder, LOCK):
        assert read_status(folder).state == "running"
    write_status(folder, here)
    child.communicate(b"\n")
    found = read_status(folder)
    assert found.state == "died" and "step 3" in found.message and found.log.splitlines()[-1] == "line 99"
    write_status(folder, replace(here, machine="elsewhere"))
    assert read_status(folder).state == "running"
    path.write_text(json.dumps({**json.loads(path.read_text()), "time": 1.0}))
    assert read_status(folder).state == "died"
    write_status(folder, replace(here, state="failed", message="why"))
    assert "line 99" in read_status(folder).log and str(read_status(folder)).endswith("why")


@pytest.mark.parametrize("text", ["{}x", '{"state": "gone"}', '{"pid": "1"}', '{"more": 1}', "[]"])
def test_a_strangers_status_is_refused(folder, text):
    (folder / "status.json").write_text(text)
    with pytest.raises(ValueError, match=r"status\.json"):
        read_status(folder)


@pytest.mark.skipif(
    os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_read_only_folder_is_named(folder):
    folder.chmod(0o500)
    try:
        with pytest.raises(OSError, match="cannot write"), FileWatcher(folder):
            pass
    finally:
        folder.chmod(0o700)


@pytest.fixture
def tiny_disk(disk):
    return disk("64k")


def test_a_full_disk_is_named_and_the_old_job_stays(tiny_disk):
    run = tiny_disk / "run"
    small = Job.from_json(GOOD)
    small.save(run, dataset(1))
    with pytest.raises(OSError, match="free space"):
        small.save(run, Dataset([(torch.zeros(1, 100, 1000), {})], ["p"], None, None, (4, 2, 2)))
    assert Job.load(run) == small and Dataset.load(run / DATA).prompts == ["p0"]
    assert not list(run.glob(".*.part"))


# ---- several processes ----------------------------------------------------------------------------


def test_one_process_needs_no_accelerate_and_a_launch_that_made_one_of_two_says_so(monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    assert parallel.launched() is None
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert parallel.launched() is None
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ValueError, match="--multi_gpu"):
        parallel.launched()


def test_config_of_every_method_survives_a_job(folder):
    for method in ("dmd2", "f_distill", "tdm", "di_star", "flow", "few_shot"):
        job = replace(Job.from_json(GOOD), config=read_config({"method": method}))
        assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_latents_of_several_parts_are_written_and_read_whole(tmp_path):
    """Winners and losers with their sound come back to the bit, and so does an empty latent's size."""
    def rows():
        return [(torch.randn(3, 2, 4, 4), torch.randn(2, 5, 3)) for _ in range(2)]

    entries = [(torch.randn(1, 4, 8), {})] * 2
    given = Dataset(entries, [], None, rows(), None, rows(), [1.0, 2.0])
    given.save(tmp_path / "data.safetensors")
    found = Dataset.load(tmp_path / "data.safetensors")
    for mine, theirs in ((given.latents, found.latents), (given.losers, found.losers)):
        assert all(torch.equal(a, b) for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=True))
    shape = ((3, 2, 4, 4), (2, 5, 3))
    Dataset(entries, [], None, None, shape).save(tmp_path / "empty.safetensors")
    assert Dataset.load(tmp_path / "empty.safetensors").shape == shape
    Dataset(entries, [], None, None, ((3, 2, 4, 4), (2, 0, 3))).save(tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="not that of a latent"):
        Dataset.load(tmp_path / "wrong.safetensors")


def test_references_go_with_their_samples(tmp_path):
    """Each sample keeps its own reference through a file; one serves all; other counts are refused."""
    entries = [(torch.randn(1, 4, 8), {}) for _ in range(3)]
    shown = [torch.randn(4, 2, 2) for _ in range(3)]
    Dataset(entries, [], None, [torch.randn(4, 2, 2)] * 3, references=shown).save(tmp_path / "data.safetensors")
    found = Dataset.load(tmp_path / "data.safetensors").references
    assert all(torch.equal(a, b) for a, b in zip(found, shown, strict=True))
    one = Dataset(entries, [], None, None, (4, 2, 2), references=shown[:1])
    assert len(one.references) == 3 and all(each is shown[0] for each in one.references)
    prompt = Dataset(entries[:1], ["p"], None, None, (4, 2, 2), references=shown)
    assert len(prompt.entries) == len(prompt.prompts) == 3
    with pytest.raises(ValueError, match="2 references for 3 samples"):
        Dataset(entries, [], None, None, (4, 2, 2), references=shown[:2])
