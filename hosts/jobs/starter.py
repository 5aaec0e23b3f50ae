"""Starts a job's process, which outlives whoever started it. The only place that starts one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...files.folder import inside
from ...trainers.dataset import Dataset
from ...trainers.job import JOB, LOG, Job, checked_folder, refuse_reward
from ...trainers.job_watch import Status, clear_commands, has_status, read_status, started, write_status
from ...trainers.loop import STATE
from ...trainers.methods import METHODS
from ...trainers.origin import data_origin, refuse_other_origin
from ...trainers.sources import MERGED, MERGED_EXPERT
from ...trainers.state import refuse_other
from ..contract import MODEL, VAE, Host
from ..training.run import Request

MOST_PROCESSES = 1024


def write_job(
    host: Host, folder: Path, model: MODEL, request: Request, vae: VAE = None, start: str = "", other: MODEL = None
) -> Job:
    """Write a run down as a job in its folder, its models by name, or merged beside it where they have none.

    start: name in the loras folder of what the student begins as. other: the expert that is not trained. ValueError for
    a model that another process cannot be told of, and while a process works in the folder; OSError where it cannot be
    written.
    """
    dataset: Dataset = request.dataset
    # Before a base is merged, which takes long and leaves a large file.
    refuse_reward(request.config)
    inside(folder).make()
    inside(folder).refuse_links()
    refuse_while_going(folder)
    # What is refused must not take the place of the job that is there.
    refuse_other(inside(folder) / STATE, request.config)
    if (inside(folder) / STATE).is_file():
        refuse_other_origin(folder, data_origin(dataset, request.start))
    decoder = None if vae is None else host.describe_vae(vae)
    if "pictures" in METHODS[request.config.method].objective.needs and decoder is None:
        raise ValueError(
            "vae: the job encodes pictures, and no file names this VAE: connect one from Load VAE or Load Checkpoint"
        )
    base = host.describe_base(model) or host.merge_base(model, folder, MERGED)
    try:
        expert = None
        if other is not None:
            expert = host.describe_base(other) or host.merge_base(other, folder, MERGED_EXPERT)
    except ValueError as error:
        raise ValueError(f"other_expert: {error}") from error
    job = Job(request.name, request.config, base, decoder, start, host.NAME, expert)
    job.save(folder, dataset)
    return job


def refuse_while_going(folder: Path) -> None:
    """ValueError while a process works in the folder."""
    if has_status(folder):
        status = read_status(folder)
        if status.going:
            raise ValueError(
                f"the job in {folder} is going on ({status}): wait for it, stop it, or choose another name"
            )


def require_accelerate(processes: int) -> None:
    """ImportError, with the command that installs it, where several processes want accelerate and it is missing."""
    if processes > 1 and find_spec("accelerate") is None:
        raise ImportError('several processes need accelerate: python -m pip install "accelerate>=1.0"')


def start(folder: Path, arguments: list[str], processes: int = 1) -> int:
    """Start the process of a job's folder, detached, and return its id; it writes to job.log.

    arguments: the host's `job_arguments()`. processes: above 1, `accelerate launch` shares each step among so many.
    ValueError for a job that cannot be read or goes on already, ImportError where accelerate is missing.
    """
    folder = checked_folder(folder)
    job = Job.load(folder)
    refuse_while_going(folder)
    clear_commands(folder)
    entry = [str(Path(__file__).resolve().parents[1] / "job.py"), str(folder / JOB), *arguments]
    # The interpreter's own flag: a portable Python must not meet the user's packages.
    command = [sys.executable, *(["-s"] if sys.flags.no_user_site else [])]
    if not 1 <= processes <= MOST_PROCESSES:
        raise ValueError(f"processes must be 1 to {MOST_PROCESSES}, got {processes!r}")
    require_accelerate(processes)
    if processes > 1:
        command += [
            "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
        ]  # fmt: skip
    lora = read_status(folder).lora if has_status(folder) else ""
    steps, machine = job.config.training.steps, socket.gethostname()
    queued = Status("queued", steps=steps, machine=machine, message="starting", lora=lora)
    with (inside(folder) / LOG).appending() as log:
        log.write(f"---- {time.strftime('%Y-%m-%d %H:%M:%S')} {job.name}: {job.config.method}\n".encode())
        process = subprocess.Popen(
            [*command, *entry], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=_environment(),
            **_DETACHED,
        )  # fmt: skip
    started(process)
    # The process needs seconds before it writes its own.
    write_status(folder, Status(**{**vars(queued), "pid": process.pid}))
    return process.pid


def _environment() -> dict[str, str]:
    # Whoever starts the job may itself be one of several: the job is not.
    mine = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in mine and not k.startswith("ACCELERATE_")}


if sys.platform == "win32":
    _DETACHED: dict[str, Any] = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
else:
    _DETACHED: dict[str, Any] = {"start_new_session": True}
