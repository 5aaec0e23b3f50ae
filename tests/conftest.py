"""What every test shares: one thread, and the ComfyUI checkout when there is one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

# Before torch is imported, which sizes its pools once. Beside another job two threads make tiny steps 20 times slower.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """Folder of the ComfyUI checkout named by COMFYUI_PATH; skips the test when the variable is not set."""
    given = os.environ.get("COMFYUI_PATH")
    if not given:
        pytest.skip("COMFYUI_PATH is not set: give it the folder of a ComfyUI checkout to run this test")
    path = Path(given).resolve()
    if not (path / "comfy" / "samplers.py").is_file():
        pytest.fail(f"COMFYUI_PATH={given} is not a ComfyUI checkout: it has no comfy/samplers.py")
    return path


@pytest.fixture
def where(tmp_path):
    """The model and output folders of the headless host, in a folder of the test's own."""
    from retort.hosts.headless.folders import Folders, use

    found = Folders(models=(tmp_path / "models",), output=tmp_path / "out")
    with use(found):
        yield found


@pytest.fixture
def disk(tmp_path):
    """disk("64k") -> a folder on a disk of that size; skips the test where none can be mounted."""
    mounted = []

    def mount(size: str) -> Path:
        place = tmp_path / "disk"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a tmpfs cannot be mounted here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", place], check=True)
