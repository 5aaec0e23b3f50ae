"""The tests on the second device, in processes of their own: a device that is registered stays."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("second_device")
_spec = importlib.util.spec_from_file_location("second_device", FOLDER / "device.py")
device = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(device)


# Runs take as long as all else there; more processes would import torch and this package more often.
FILES = sorted(path.name for path in FOLDER.glob("test_*.py") if path.name != "test_runs.py")


@pytest.mark.slow
@pytest.mark.parametrize("names", [FILES, ["test_runs.py"]], ids=["all but runs", "runs"])
def test_on_the_second_device(names):
    if reason := device.ready():
        pytest.skip(reason)
    given = {**os.environ, "RETORT_SECOND_DEVICE": "plain", "RETORT_DEVICE": device.NAME}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(FOLDER / name) for name in names)],
        cwd=FOLDER.parent.parent, env=given, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-20_000:]}\n{done.stderr[-2_000:]}"
