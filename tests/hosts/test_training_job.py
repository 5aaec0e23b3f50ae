"""A job in a process of its own: the same LoRA as in the node, however often it was killed, stopped and shared."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import retort
from retort.files.atomic import locked
from retort.hosts import cli, job
from retort.hosts.headless.folders import use
from retort.hosts.headless.host import host
from retort.hosts.jobs import starter
from retort.hosts.jobs.process import run_job
from retort.hosts.training import run as training
from retort.models import loader
from retort.sampling.path import VE
from retort.sampling.schedule import DiscreteSchedule
from retort.trainers import job_watch
from retort.trainers.dataset import Dataset, entries_of
from retort.trainers.job import DATA, JOB, LOCK, LOG, Job
from retort.trainers.job_watch import read_status, send
from retort.trainers.methods import read_config
from retort.trainers.watch import Silent, read_metrics

PROMPTS = ["a red 3", "a blue 7", "a red 3", "a blue 7"]
# Resolved, since the package may be found through a link.
ENTRY = Path(retort.__file__).resolve().parent / "hosts" / "job.py"


def dataset(clip) -> Dataset:
    latents = [torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    entries = entries_of([host.encode_text(clip, prompt) for prompt in PROMPTS], "positive")
    return Dataset(entries, PROMPTS, entries_of([host.encode_text(clip, "")], "negative")[0], latents)


@pytest.fixture
def request_for(where):
    """request_for(name, **training settings) -> (model, vae, request); small enough for dozens of steps a second."""
    model, clip, vae = host.embedded("flow")

    def make(name="mine", **settings):
        settings = {"steps": 8, "batch_size": 2, "preview_every": 0, "previews": 1, "warmup": 2} | settings
        config = {"method": "flow", "objective": {"steps": 2}, "training": settings, "lora": {"rank": 2}}
        return model, vae, training.Request(name, read_config(config), dataset(clip))

    return make


@pytest.fixture
def made(request_for):
    """made(name, **training settings) -> the folder of a job that waits."""

    def make(name="mine", **settings):
        model, vae, request = request_for(name, **settings)
        folder = host.runs_folder() / name
        starter.write_job(host, folder, model, request, vae)
        return folder

    return make


def until(condition, seconds=300.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


def same(a: Path, b: Path) -> bool:
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_killed_stopped_and_finished_elsewhere_it_is_the_nodes_lora_to_the_bit(made, request_for):
    # So many steps that both signals, however late, come before the last; how many it is to be is said at the end.
    settings = {"steps": 100_000, "save_every": 10}
    folder = made("mine", **settings)
    pid = starter.start(folder, host.job_arguments())
    assert read_status(folder).going
    with pytest.raises(ValueError, match="is going on"):
        starter.start(folder, host.job_arguments())
    with pytest.raises(ValueError, match="is going on"):
        made("mine", **settings)
    until((folder / "state.safetensors").is_file)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not read_status(folder).going)
    status = read_status(folder)
    assert status.state == "died" and "start it again" in status.message
    assert "mine: flow" in (folder / LOG).read_text()

    pid = starter.start(folder, host.job_arguments())
    before = (folder / "state.safetensors").stat().st_mtime_ns
    until(lambda: (folder / "state.safetensors").stat().st_mtime_ns != before)
    os.kill(pid, signal.SIGTERM)
    until(lambda: not read_status(folder).going)
    status = read_status(folder)
    assert status.state == "stopped" and status.step > 10, (status, job_watch.log_tail(folder))

    settings["steps"] = status.step + 5
    made("mine", **settings)
    assert run_job(host, folder).state == "finished"
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == list(range(1, settings["steps"] + 1))
    model, vae, request = request_for("inside", **settings)
    result = training.run(host, model, request, watcher=Silent(), vae=vae)
    assert same(result.path, host.loras_folder() / read_status(folder).lora)


class Sends(Silent):
    """Sends commands to a job when it has done some steps."""

    def __init__(self, folder, at):
        self.folder, self.at, self.pictures = folder, at, []

    def step(self, done, total, metrics):
        for command in self.at.get(done, ()):
            send(self.folder, command)

    def preview(self, images, done, path):
        self.pictures.append(path)


def test_it_saves_samples_and_stops_when_told(made, monkeypatch):
    monkeypatch.setattr(job_watch, "LOOK_EVERY", 0.0)
    folder = made(save_every=0, keep=9)
    watcher = Sends(folder, {2: ["save"], 3: ["sample"], 5: ["stop"]})
    status = run_job(host, folder, watcher)
    assert status.state == "stopped" and status.step == 5 and "run it again" in status.message
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == [
        "step_0000002.safetensors", "step_0000005.safetensors"
    ]  # fmt: skip
    assert [p.name for p in watcher.pictures] == ["step_0000003.png"]
    assert read_status(folder).preview == "previews/step_0000003.png"
    # A command that nobody heard in time is forgotten, and a finished job is not done again.
    send(folder, "stop")
    assert run_job(host, folder).state == "finished"
    assert run_job(host, folder).lora == "mine.safetensors"
    assert len(list(host.loras_folder().iterdir())) == 1
    # Queued, it may be stopped before it has begun.
    other = made("other")
    job_watch.write_status(other, job_watch.Status("queued", pid=os.getpid(), machine=os.uname().nodename))
    send(other, "stop")
    assert (run_job(host, other).state, read_status(other).step) == ("stopped", 0)


def test_two_processes_do_not_take_one_job(made):
    folder = made()
    with locked(folder, LOCK), pytest.raises(BlockingIOError, match="still going"):
        run_job(host, folder)
    assert not (folder / job_watch.STATUS).exists()
    with locked(folder), pytest.raises(BlockingIOError, match="still going"):
        run_job(host, folder)
    assert read_status(folder).state == "failed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {"steps": 10**12}}, "steps must be between"),
        ({"started_by": "comfyui"}, "--comfyui DIR"),
        ({"base": {"kind": "embedded", "variant": "none"}}, "variant 'none' is not known"),
        ({"base": {"kind": "checkpoint", "file": "none.safetensors"}}, "was not found"),
        ({"base": {"kind": "diffusers", "folder": "none"}}, "was not found"),
        ({"base": {"kind": "merged", "file": "base.safetensors"}}, "merged by ComfyUI"),
        ({"vae": {"kind": "vae", "file": "none.safetensors"}}, "was not found"),
        ({"start": "none.safetensors"}, "none.safetensors"),
        ({"lora": {"targets": "nothing*"}}, "no layer's name fits"),
    ],
)
def test_a_job_that_cannot_be_done_says_why(made, where, change, message):
    folder = made()
    path = folder / JOB
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    arguments = [str(path), *host.job_arguments()]
    assert job.main(arguments) == job.USAGE
    status = read_status(folder)
    assert status.state == "failed" and message in status.message
    result = CliRunner().invoke(cli.app, ["train", str(folder), "--models", str(where.models[0])])
    assert result.exit_code == 2 and result.stdout == ""
    assert CliRunner().invoke(cli.app, ["job", "status", str(folder)]).exit_code == 3


def test_other_settings_are_refused_and_the_state_stays(made, request_for):
    folder = made(steps=4)
    assert run_job(host, folder).state == "finished"
    state = (folder / "state.safetensors").read_bytes()
    job_file = (folder / JOB).read_text()
    with pytest.raises(ValueError, match="training.learning_rate"):
        made(steps=6, learning_rate=1e-3)
    assert (folder / JOB).read_text() == job_file and read_status(folder).state == "finished"
    other = json.loads(job_file)
    other["training"] |= {"steps": 6, "learning_rate": 1e-3}
    (folder / JOB).write_text(json.dumps(other))
    with pytest.raises(ValueError, match="training.learning_rate"):
        run_job(host, folder)
    status = read_status(folder)
    assert (status.state, status.step, status.lora) == ("finished", 4, "mine.safetensors")
    assert status.message.startswith("last request refused: ") and "training.learning_rate" in status.message
    assert (folder / "state.safetensors").read_bytes() == state
    made(steps=6)
    assert run_job(host, folder).step == 6 and not read_status(folder).message


@pytest.fixture
def tiny_disk(disk):
    return disk("8m")


class Fills(Silent):
    """Leaves no room on a disk once some steps are done."""

    def __init__(self, disk, at):
        self.disk, self.at = disk, at

    def step(self, done, total, metrics):
        if done == self.at:
            with open(self.disk / "filler", "wb", buffering=0) as handle, pytest.raises(OSError):
                while True:
                    handle.write(b"x" * 4096)


def test_a_full_disk_ends_the_run_and_loses_no_saved_step(tiny_disk, where):
    with use(replace(where, output=tiny_disk)):
        model, clip, vae = host.embedded("flow")
        config = {"method": "flow", "training": {"steps": 8, "batch_size": 2, "save_every": 3, "keep": 0}}
        request = training.Request("mine", read_config({**config, "lora": {"rank": 1}}), dataset(clip))
        folder = host.runs_folder() / "mine"
        starter.write_job(host, folder, model, request, vae)
        with pytest.raises(OSError, match="free space"):
            run_job(host, folder, Fills(tiny_disk, 4))
        (tiny_disk / "filler").unlink()
        assert run_job(host, folder).state == "finished"
        steps = [row["step"] for row in read_metrics(folder / "metrics.jsonl")]
        assert steps == list(range(1, 9)) and not list(folder.rglob(".*.part"))


@pytest.mark.parametrize("change", ["prompts", "latents"])
def test_a_job_on_other_data_is_refused_and_leaves_what_is_there(made, request_for, change):
    folder = made("mine", steps=2)
    assert run_job(host, folder).state == "finished"
    before = {name: (folder / name).read_bytes() for name in (DATA, JOB)}
    model, vae, request = request_for("mine", steps=4)
    if change == "prompts":
        clip = host.embedded("flow")[1]
        request.dataset.entries = entries_of([host.encode_text(clip, f"a green {i}") for i in range(4)], "positive")
    else:
        request.dataset.latents = [latent.flip(0) for latent in request.dataset.latents]
    with pytest.raises(ValueError, match=f"name: the run .* was started with other {change}"):
        starter.write_job(host, folder, model, request, vae)
    assert {name: (folder / name).read_bytes() for name in (DATA, JOB)} == before
    starter.write_job(host, folder, *request_for("mine", steps=4)[::2], vae)
    assert run_job(host, folder).step == 4


def test_the_command_line_trains_and_tells(made, where, tmp_path):
    folder = made()
    arguments = ["--models", str(where.models[0]), "--out", str(where.output)]
    result = CliRunner().invoke(cli.app, ["train", str(folder / JOB), *arguments])
    assert result.exit_code == 0, result.stderr
    assert Path(result.stdout.strip()) == where.models[0] / "loras" / "mine.safetensors"
    told = CliRunner().invoke(cli.app, ["job", "status", str(folder)])
    assert told.exit_code == 0 and told.stdout.startswith("finished, step 8 of 8")
    assert CliRunner().invoke(cli.app, ["job", "stop", str(folder)]).exit_code == 2
    assert CliRunner().invoke(cli.app, ["train", str(tmp_path)]).exit_code == 2


def test_a_base_is_named_with_its_shift_and_loras_or_not_at_all(where):
    model, _, vae = host.embedded("flow")
    lora = min((loader.FOLDER / "loras").glob("digits_flow_*.safetensors"))
    from retort.graphs.core.loaders import LoraLoaderModelOnly

    patched = LoraLoaderModelOnly.execute(model, lora.name, 0.5).args[0]
    shifted = host.with_shift(patched, 1.5)
    base = host.describe_base(shifted)
    assert (base.kind, base.variant, base.shift) == ("embedded", "flow", 1.5) and base.loras[0].strength == 0.5
    again = host.load_base(base, where.output)
    assert again.schedule == shifted.schedule and [o.name for o in again.loras] == [lora.name]
    x, sigma = torch.randn(1, 16, 8, 8), torch.tensor([0.5])
    outputs = [m.network(x, sigma, context=torch.zeros(1, 4, 128), y=torch.zeros(1, 128)) for m in (shifted, again)]
    assert torch.equal(*outputs)
    other = model.with_sampling(DiscreteSchedule(), VE, "eps")
    assert host.describe_base(other) is None and host.describe_vae(replace(vae, origin=None)) is None
    with pytest.raises(ValueError, match="another sampling"):
        host.merge_base(other, where.output, "base.safetensors")


@pytest.mark.slow
def test_two_processes_train_what_one_does(made):
    """accelerate (gloo, CPU): the same global batch. Shares of every kind are tested with threads, in test_parallel."""
    settings = {"steps": 5, "batch_size": 2, "accumulation": 3, "ema": 0.9}
    alone, shared = made("alone", **settings), made("shared", **settings)
    assert run_job(host, alone).state == "finished"
    starter.start(shared, host.job_arguments(), processes=2)
    until(lambda: not read_status(shared).going)
    status = read_status(shared)
    assert status.state == "finished", (status, job_watch.log_tail(shared))
    a, b = (load_file(folder / "checkpoints" / "step_0000005.safetensors") for folder in (alone, shared))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=2e-4, atol=2e-6)
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (alone, shared)]
    assert [r["student_loss"] for r in rows[0]] == pytest.approx([r["student_loss"] for r in rows[1]], rel=1e-4)


def test_the_entry_registers_its_package_and_nothing_else(tmp_path):
    """Started by its path from anywhere, with no `retort` installed and a stranger's modules beside it."""
    (tmp_path / "training.py").write_text("raise SystemExit('the wrong training')")
    code = (
        "import runpy, sys\n"
        f"sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f)]\n"
        f"m = runpy.run_path({str(ENTRY)!r})\n"
        "m['register']()\n"
        "import retort\n"
        f"assert retort.__path__ == [{str(ENTRY.parents[1])!r}], retort.__path__\n"
        "assert not any(p.endswith('hosts') for p in sys.path), sys.path\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('api') is None and importlib.util.find_spec('retort.trainers.job')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([sys.executable, ENTRY, tmp_path / "nothing"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == job.USAGE and "is no job" in done.stderr, done.stderr


def test_a_job_in_the_file_is_what_the_node_said(made, request_for):
    folder = made()
    _, _, request = request_for()
    found = Job.load(folder)
    assert found.config == request.config and found.started_by == "headless" and found.vae.variant == "flow"


@pytest.mark.parametrize("expert", ["high noise", "low noise"])
def test_a_jobs_preview_is_drawn_by_both_experts_as_the_nodes_is(request_for, expert):
    """And it is neither what one of them draws alone, nor what the trained one draws of all levels."""
    model, vae, plain = request_for("alone", steps=1, preview_every=1)
    objective = {"steps": 4, "expert": expert, "boundary": 0.6}
    request = replace(plain, config=read_config({**plain.config.to_json(), "objective": objective}))
    lora = min((loader.FOLDER / "loras").glob("digits_flow_*.safetensors"))
    from retort.graphs.core.loaders import LoraLoaderModelOnly

    other = LoraLoaderModelOnly.execute(model, lora.name, 1.0).args[0]
    drawn = []
    for name, second in (("alone", None), ("node", other), ("job", other)):
        folder = host.runs_folder() / name
        one = replace(request, name=name)
        if name == "job":
            starter.write_job(host, folder, model, one, vae, other=second)
            assert Job.load(folder).other_expert.loras[0].file == lora.name
            assert run_job(host, folder).state == "finished"
        else:
            training.run(host, model, one, watcher=Silent(), vae=vae, other=second)
        drawn.append((folder / "previews" / "step_0000001.png").read_bytes())
    assert drawn[1] == drawn[2] and drawn[1] != drawn[0]
    with pytest.raises(ValueError, match="other_expert: model has another sampling"):
        strange = other.with_sampling(DiscreteSchedule(), VE, "eps")
        starter.write_job(host, host.runs_folder() / "strange", model, request, vae, other=strange)
    with pytest.raises(ValueError, match="of the same build as model"):
        training.run(host, model, replace(request, name="strange"), watcher=Silent(), vae=vae, other=strange)
