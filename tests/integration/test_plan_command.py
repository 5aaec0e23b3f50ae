"""`retort plan --comfyui DIR`, whole: a process of its own on a file that is tiny, of which only the header is read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_training as tiny

pytestmark = pytest.mark.integration
REPOSITORY = Path(__file__).resolve().parents[2]
files = tiny.files
# The command where no package is installed: as a job's process finds this folder.
RUN = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from job import register; register(); "
    "sys.argv[0] = 'retort'; from retort.hosts.cli import app; app()"
)


@pytest.fixture
def plan(comfyui):
    """plan(file, ...) -> the finished process of the command."""

    def run(file, *given):
        command = [sys.executable, "-c", RUN, str(REPOSITORY / "hosts"), "plan", str(file), "--comfyui", str(comfyui)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "400"}
        return subprocess.run([*command, *given], capture_output=True, text=True, env=environment, check=False)

    return run


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("flux", ["--method", "dmd2", "--width", "128", "--height", "64", "--tokens", "6"]),
        ("wan", ["--width", "64", "--height", "64", "--frames", "5", "--tokens", "8"]),
    ],
)
def test_a_file_is_planned_with_comfyuis_own_network(files, plan, kind, given):
    done = plan(files(kind), "--rank", "2", "--cards", "8, 24", *given)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.strip().splitlines()
    method = "dmd2" if "dmd2" in given else "flow"
    assert lines[-3].startswith(f"{method}, rank 2, batch 1, adamw: base ")
    assert [line.partition(": ")[0] for line in lines[-2:]] == ["8 GB", "24 GB"]
    assert all("the base stays on the card, peak about" in line for line in lines[-2:])


def test_mistakes_are_one_message(files, plan, tmp_path):
    for file, given, message in (
        (tmp_path / "none.safetensors", [], "there is no"),
        (files("sd15"), ["--method", "magic"], "method must be one of"),
    ):
        done = plan(file, *given)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
