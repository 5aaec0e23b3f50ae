"""The GPU's benchmark as it is run, in small on the processor: real ComfyUI, tiny networks of the same classes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.integration


def run(comfyui, tmp_path, only):
    """The figures and the section."""
    files = tmp_path / "figures.json", tmp_path / "results.md"
    command = [
        sys.executable, "-m", "retort.benchmarks.gpu", "--comfyui", str(comfyui), "--small", "--only", only,
        "--json", str(files[0]), "--results", str(files[1]),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(files[0].read_text(encoding="utf-8"))["figures"], files[1].read_text(encoding="utf-8")


@pytest.mark.parametrize("network", ["SDXL", "Flux fp8", "Z-Image"])
def test_a_step_streamed_and_resident(comfyui, tmp_path, network):
    figures, text = run(comfyui, tmp_path, f"{network}, flow")
    assert "Not measured" not in text
    for base in ("streamed", "resident"):
        assert figures[f"{network}, flow, {base}: a step"]["value"] > 0
        assert figures[f"{network}, flow, {base}: peak"]["value"] > 0


def test_sampling_and_the_embedded_model(comfyui, tmp_path):
    figures, text = run(comfyui, tmp_path, "SDXL, dmd2_sdxl_4step")
    assert "Not measured" not in text and len(figures) == 1
    figures, text = run(comfyui, tmp_path, "eps, flow")
    assert "Not measured" not in text and len(figures) == 2
