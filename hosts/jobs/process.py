"""A job from its folder to its LoRA, in this process; `hosts/job.py` and `retort train` both end here."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...files.folder import inside
from ...trainers.dataset import Dataset
from ...trainers.job import DATA, Job, checked_folder
from ...trainers.job_watch import FileWatcher, Follower, Status, clear_commands, has_status, holding, read_status
from ...trainers.loop import Reducer, Stopped
from ...trainers.parallel import launched
from ...trainers.watch import Watcher
from ..contract import Host
from ..training.run import Request, run, start_of

_log = logging.getLogger("retort.job")


def run_job(host: Host, path: Path, show: Watcher | None = None) -> Status:
    """Do a job, going on where it was, and return how it ended: "finished" or "stopped".

     path: job.json, or its folder. show: who watches besides status.json. Raises what
    `hosts.training.run.run` and the reading of the job raise; status.json then says "failed" and why. ValueError before
    anything is written for a folder that is no job or whose links lead out of it, BlockingIOError when another process
    works on it.
    """
    folder = checked_folder(path)
    reducer = launched()
    if reducer is not None and reducer.rank:
        follower = Follower()
        try:
            with _signals(follower, patient=True):
                _train(host, folder, Job.load(folder), follower, reducer)
        except Stopped:
            return Status("stopped")
        reducer.close()
        return Status("finished")
    with holding(folder):
        found = read_status(folder) if has_status(folder) else None
        if found is None or found.state != "queued":
            # Whoever queued it has cleared them, and may have sent one since.
            clear_commands(folder)
        watcher = FileWatcher(folder, found, reducer is None, show)
        with watcher, _signals(watcher, patient=reducer is not None):
            status = _watched(host, folder, watcher, reducer, found)
    if reducer is not None:
        reducer.close()
    return status


def _watched(host: Host, folder: Path, watcher: FileWatcher, reducer: Reducer | None, found: Status | None) -> Status:
    try:
        job = Job.load(folder)
        steps = job.config.training.steps
        if found is not None and found.state == "finished" and found.steps >= steps and _there(host, found.lora):
            _log.info("the job is finished already: %s", found.lora)
            watcher.end("finished", lora=found.lora)
            return watcher.status
        lora = _train(host, folder, job, watcher, reducer)
    except Stopped as stopped:
        watcher.stop(str(stopped))
        return watcher.status
    except BaseException as error:
        watcher.fail(error)
        raise
    watcher.end("finished", lora=lora)
    return watcher.status


def _train(host: Host, folder: Path, job: Job, watcher: Watcher, reducer: Reducer | None) -> str:
    if job.started_by != host.NAME:
        remedy = "start it with --comfyui DIR" if job.started_by == "comfyui" else "start it without --comfyui"
        raise ValueError(
            f"started_by is {job.started_by!r}, and this process runs {host.NAME}: {remedy}, so that the base is the "
            "same"
        )
    dataset = Dataset.load(inside(folder) / DATA)
    watcher.says("loading the base model")
    model = host.load_base(job.base, folder)
    vae = None if job.vae is None else host.load_vae(job.vae)
    start, recipe = start_of(host, job.start) if job.start else (None, "")
    request = Request(job.name, job.config, dataset, start, recipe)
    other = None if job.other_expert is None else host.load_base(job.other_expert, folder)
    result = run(host, model, request, watcher=watcher, vae=vae, other=other, folder=folder, reducer=reducer)
    return "" if result.path is None else result.path.name


def _there(host: Host, lora: str) -> bool:
    return bool(lora) and Path(lora).name == lora and (host.loras_folder() / lora).is_file()


@contextmanager
def _signals(watcher: FileWatcher | Follower, patient: bool) -> Iterator[None]:
    """SIGTERM and Ctrl+C save and leave; a second one leaves at once, unless patient.

    patient: a launcher hands each signal on, which the process may have had from elsewhere already.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def heard(number: int, frame: Any) -> None:
        watcher.ask_to_stop()
        if not patient:
            for kind, handler in before.items():
                signal.signal(kind, handler)

    try:
        for kind in kinds:
            signal.signal(kind, heard)
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
