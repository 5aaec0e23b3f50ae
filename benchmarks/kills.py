"""kill -9 of trainings: each goes on to the LoRA of a run that nobody disturbed, to the bit.

`python -m retort.benchmarks.kills [--quick] [--json FILE] [--write]`, where processes can be forked; the runs are jobs
of the embedded model, trained as `retort train` does. They are killed at moments of three kinds: at random before the
first new step, at random some steps after it, and while a temporary file is there. On a full disk (a tmpfs, which only
root can mount) a run meets an error or is killed there, and goes on when there is space again. With COMFYUI_PATH, the
folder of a checkout, in an environment with its packages, the server is killed while a node trains, too. A run counts
when its LoRA equals the other's and its log tells every step once.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..files.folder import part_name
from ..files.log_file import METRICS, last_step, read_rows
from .comfyui import ROOT, Server
from .report import Figure, Report, arguments, finish

METHODS = ("flow", "dmd2", "tdm")
MOMENTS = ("before a step", "after some steps", "at a temporary file")
PATIENCE = 120.0  # seconds for whatever is waited for
DISK = "48m"


class Run:
    """A job of the embedded model in a folder, begun in a process of its own as often as need be."""

    def __init__(self, output: Path, models: Path, method: str, name: str, steps: int):
        from ..hosts.headless.folders import Folders, use
        from ..hosts.headless.host import host
        from ..hosts.jobs import starter
        from ..hosts.training import run as training
        from ..trainers.dataset import Dataset, entries_of
        from ..trainers.methods import read_config

        self.where, self.steps, self.use, self.host = Folders(models=(models,), output=output), steps, use, host
        settings: dict[str, Any] = {"steps": steps, "batch_size": 2, "warmup": 2, "save_every": 2}
        settings |= {"preview_every": 5, "previews": 1, "keep": 2, "ema": 0.9}
        config = {"method": method, "objective": {}, "training": settings, "lora": {"rank": 2}}
        prompts = ["a red 3", "a blue 7", "a green 1", "a bold 9"]
        with use(self.where), torch.no_grad():
            model, clip, vae = host.embedded("flow")
            latents = [torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(len(prompts))]
            positive = entries_of([host.encode_text(clip, prompt) for prompt in prompts], "positive")
            negative = entries_of([host.encode_text(clip, "")], "negative")[0]
            data = Dataset(positive, prompts, negative, latents)
            self.folder = host.runs_folder() / name
            starter.write_job(host, self.folder, model, training.Request(name, read_config(config), data), vae)
            self.loras = host.loras_folder()
            self.loras.mkdir(parents=True, exist_ok=True)

    def begin(self) -> int:
        """Go on in a new process; its id."""
        from ..hosts.jobs.process import run_job

        child = os.fork()
        if child:
            return child
        code = 1
        try:
            # What it says goes where a job's words go; a full disk may take none.
            log = os.open(self.loras.parent / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            os.dup2(log, 1)
            os.dup2(log, 2)
            with self.use(self.where):
                code = 0 if run_job(self.host, self.folder).state == "finished" else 3
        except OSError:
            code = 2
        finally:
            os._exit(code)

    def alone(self) -> None:
        """Train from the beginning to the end, in this process, which has then imported what the others need."""
        from ..hosts.jobs.process import run_job

        with self.use(self.where):
            run_job(self.host, self.folder)

    def finish(self) -> None:
        """Train to the end, in a process of its own. RuntimeError when that fails."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.begin(), 0)[1])
        if status:
            raise RuntimeError(f"{self.folder} ended with {status}")

    @property
    def done(self) -> int:
        """Steps that its log tells of."""
        return last_step(self.folder / METRICS)

    def parts(self) -> list[Path]:
        """Temporary files of it and of its LoRA."""
        return [*self.folder.rglob("*.part"), *self.loras.glob("*.part")]


def lora_of(folder: Path, loras: Path) -> dict[str, Any]:
    """What a run has made."""
    return load_file(loras / json.loads((folder / "result.json").read_text())["file"])


def equal(folder: Path, whole: Path, loras: Path, steps: int) -> bool:
    """Whether a run came to the same LoRA as another, with every step told once."""
    a, b = lora_of(folder, loras), lora_of(whole, loras)
    same = a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    told = [row["step"] for row in read_rows(folder / METRICS)] == list(range(1, steps + 1))
    return same and told


def until(happened: Callable[[], object], pause: float = 0.0005) -> None:
    """Wait. RuntimeError when it takes too long."""
    end = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > end:
            raise RuntimeError("nothing happened in time")
        time.sleep(pause)


def killed(run: Run, moment: str, draw: random.Random) -> bool:
    """Go on with a run and kill it at a moment; whether it was still there."""
    before, child = run.done, run.begin()
    ended: list[int] = []

    def over() -> bool:
        if not ended and os.waitpid(child, os.WNOHANG)[0]:
            ended.append(child)
        return bool(ended)

    if moment == MOMENTS[0]:
        time.sleep(draw.uniform(0, 1.0))
    elif moment == MOMENTS[1]:
        steps = draw.randrange(1, 4)
        until(lambda: over() or run.done >= before + steps)
        time.sleep(draw.uniform(0, 0.05))
    else:
        until(lambda: over() or run.done > before)
        until(lambda: over() or run.parts(), 0.0)
    if over():
        return False
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kills(report: Report, count: int, methods: tuple[str, ...] = METHODS) -> None:
    """`count` kills of processes, in one run for each method."""
    draw, good, tried, left, stayed = random.Random(0), 0, 0, 0, 0
    moments = dict.fromkeys(MOMENTS, 0)
    with tempfile.TemporaryDirectory() as temporary:
        for number, method in enumerate(methods):
            mine = count // len(methods) + (number < count % len(methods))
            runs = [Run(Path(temporary) / "out", Path(temporary) / "models", method, f"{method}_{name}", 4 * mine + 10)
                    for name in ("whole", "killed")]  # fmt: skip
            runs[0].alone()
            now = 0
            while now < mine and runs[1].done < runs[1].steps - 4:
                moment = MOMENTS[(now + number) % 3]
                if killed(runs[1], moment, draw):
                    now, moments[moment] = now + 1, moments[moment] + 1
                    left += bool(runs[1].parts())
            # As a kill in the middle of writing leaves them, of each kind of file.
            for name in ("state.safetensors", "metrics.jsonl", "checkpoints/step_0000002.safetensors"):
                stale = (runs[1].folder / name).with_name(part_name(Path(name).name))
                stale.parent.mkdir(exist_ok=True)
                stale.write_bytes(b"half of it")
            runs[1].finish()
            tried += now
            stayed += len(runs[1].parts())
            good += now * equal(runs[1].folder, runs[0].folder, runs[0].loras, runs[0].steps)
    report.figures["processes: kills"] = Figure(tried, target=count, better="higher")
    report.figures |= {f"processes: killed {moment}": Figure(times) for moment, times in moments.items()}
    report.figures["processes: kills that left a temporary file"] = Figure(left)
    report.figures["processes: temporary files that stay when the runs have ended"] = Figure(stayed, target=0)
    report.figures["processes: kills after which the LoRA is the same"] = Figure(good, target=count, better="higher")


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[bool]:
    """A small disk at a folder; False where it cannot be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Fill a disk to its last byte; the file that does."""
    filler = folder / "filler"
    with filler.open("ab", buffering=0) as handle:
        for size in (1 << 20, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    handle.write(b"\0" * size)
    return filler


def full_disk(report: Report, count: int) -> None:
    """`count` times the disk is full while a run trains: it ends with an error, or is killed where every third is."""
    with tempfile.TemporaryDirectory() as temporary, disk(Path(temporary) / "disk") as mounted:
        if not mounted:
            return
        output, models = Path(temporary) / "disk", Path(temporary) / "models"
        runs = [Run(output, models, "flow", name, 4 * count + 10) for name in ("whole", "filled")]
        runs[0].alone()
        refused = ends = 0
        for number in range(count):
            before, child = runs[1].done, runs[1].begin()
            until(partial(lambda before: runs[1].done > before, before))
            filler = fill(output)
            if number % 3 == 2:
                os.kill(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            refused += code == 2
            # On the full disk it does not begin, and nothing is lost by trying.
            ends += code in (2, -signal.SIGKILL) and os.waitstatus_to_exitcode(os.waitpid(runs[1].begin(), 0)[1]) == 2
            filler.unlink()
        runs[1].finish()
        same = equal(runs[1].folder, runs[0].folder, runs[0].loras, runs[0].steps)
    report.figures["full disk: times that it was full"] = Figure(count)
    report.figures["full disk: ended with an error of ours, the others killed"] = Figure(refused)
    report.figures["full disk: then refused to begin, as it should"] = Figure(ends, target=count, better="higher")
    report.figures["full disk: times after which the LoRA is the same"] = Figure(
        count * same, target=count, better="higher"
    )


def prompt(name: str, steps: int) -> dict[str, Any]:
    """A node that trains on eight pictures that the workflow makes."""
    import asyncio

    from ..graphs import registry, workflow

    source = ROOT / "workflows" / "Train - A style from eight pictures.json"
    graph = workflow.read(source, asyncio.run(registry.everything())).prompt()
    train = next(id for id, node in graph.items() if node["class_type"] == "RetortTrainFlow")
    graph[train]["inputs"] |= {
        "name": name, "steps": steps, "batch_size": 2, "rank": 2, "preview_every": 5, "previews": 1, "save_every": 2,
        "offload": "auto",
    }  # fmt: skip
    needed, waiting = set(), [train]
    while waiting:
        needed.add(id := waiting.pop())
        waiting += [v[0] for v in graph[id]["inputs"].values() if isinstance(v, list) and v[0] not in needed]
    return {id: graph[id] for id in needed}


def servers(report: Report, checkout: Path, count: int) -> None:
    """`count` kills of ComfyUI while a node trains, which is queued again each time."""
    draw, steps, tried = random.Random(1), 8 * count + 20, 0
    with Server(checkout) as server:
        runs, loras = server.folder / "output" / "retort", server.folder / "models" / "loras"
        loras.mkdir(parents=True, exist_ok=True)
        server.wait(server.queue(prompt("whole", steps)), "the undisturbed run")
        for _ in range(count):
            log = runs / "killed" / METRICS
            before = last_step(log)
            server.queue(prompt("killed", steps))
            further = draw.randrange(1, 6)
            until(partial(lambda path, least: last_step(path) >= least, log, before + further), 0.002)
            time.sleep(draw.uniform(0, 0.1))
            server.kill()
            tried += last_step(log) < steps
            server.start()
        server.wait(server.queue(prompt("killed", steps)), "the killed run")
        same = equal(runs / "killed", runs / "whole", loras, steps)
    report.figures["ComfyUI: kills of the server"] = Figure(tried, target=count, better="higher")
    report.figures["ComfyUI: kills after which the LoRA is the same"] = Figure(
        tried * same, target=count, better="higher"
    )


def main() -> None:
    """Kill, compare and print."""
    options = arguments(__doc__).parse_args()
    if sys.platform == "win32":
        raise SystemExit("processes are forked here, which Windows does not do")
    torch.set_num_threads(1)
    report = Report("kills")
    kills(report, 12 if options.quick else 50)
    full_disk(report, 3 if options.quick else 9)
    checkout = os.environ.get("COMFYUI_PATH")
    if checkout:
        servers(report, Path(checkout).resolve(), 2 if options.quick else 10)
    finish(report, options)


if __name__ == "__main__":
    main()
