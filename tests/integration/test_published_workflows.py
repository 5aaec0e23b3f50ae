"""Templates for published models: in ComfyUI nothing is missing but the files that each says to download."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import snapshots

from retort.hosts import presets

pytestmark = [pytest.mark.integration, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = sorted(snapshots.PUBLISHED | snapshots.TRAINED)


@pytest.fixture(scope="module")
def told(comfyui) -> dict[str, dict]:
    files = [str(REPOSITORY / "workflows" / f"{name}.json") for name in NAMES]
    script = Path(__file__).with_name("examined.py")
    done = subprocess.run(
        [sys.executable, str(script), str(comfyui), *files], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(NAMES, map(json.loads, lines), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_only_files_are_missing_and_each_says_where_it_comes_from(told, name):
    found = told[name]
    assert found["missing"] and not found["notes"]
    for kind, detail, remedy in found["missing"]:
        assert kind == "file" and "https://huggingface.co/" in remedy, (detail, remedy)
    # ComfyUI's own check of what would be queued finds nothing else.
    assert found["errors"] == ["value_not_in_list"]


@pytest.mark.parametrize("name", sorted(snapshots.PUBLISHED))
def test_its_preset_is_for_the_file_that_it_loads(told, name):
    prompt = told[name]["prompt"]
    setups = [node["inputs"] for node in prompt.values() if node["class_type"] == "RetortDistilledSetup"]
    files = {
        value for node in prompt.values() for value in node["inputs"].values()
        if isinstance(value, str) and value.endswith(".safetensors")
    }  # fmt: skip
    assert setups
    for setup in setups:
        preset = presets.named(setup["preset"], ())
        assert any(Path(file).match(pattern) for file in files for pattern in preset.files), (preset.files, files)
        assert setup["steps"] in (0, *preset.step_counts)
