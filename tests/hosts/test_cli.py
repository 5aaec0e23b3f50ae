"""The command line: what it prints, where it writes, and its exit codes."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
from typer.testing import CliRunner

from retort.files import pictures as images
from retort.graphs import registry
from retort.hosts import cli


@pytest.fixture
def command(monkeypatch, known, tmp_path):
    """command(*arguments) -> typer's result, with TinyLoader among the nodes and a wide terminal."""
    monkeypatch.setenv("RETORT_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("COLUMNS", "200")

    nodes = known()

    async def everything():
        return nodes

    monkeypatch.setattr(registry, "everything", everything)
    return lambda *arguments: CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture
def written(api, where, tmp_path):
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(api))
    return path


def test_run_saves_images_and_prints_their_paths(command, written, tmp_path):
    result = command("run", written, "--out", tmp_path / "out", "--set", "Draw.steps=2", "--seed", 3)
    assert result.exit_code == 0, result.stderr
    saved = tmp_path / "out" / "tiny_00001_.png"
    assert result.stdout.splitlines() == [str(saved)]
    assert "1 images in" in result.stderr
    inputs = json.loads(images.read_texts(saved)["prompt"])["5"]["inputs"]
    assert (inputs["steps"], inputs["seed"]) == (2, 3)
    assert command("run", saved, "--out", tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "tiny_00002_.png").is_file()


def test_a_mistake_is_one_message_and_exit_code_2(command, written, tmp_path):
    result = command("run", written, "--out", tmp_path / "out", "--set", "5.steps=0")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr == (
        'error: node 5 "Draw" (KSampler), input "steps": it must be at least 1 (got 0). '
        "Allowed: 1 to 10000; the default is 20.\n"
    )
    assert not (tmp_path / "out").exists()
    assert "Traceback" in command("run", written, "--set", "5.steps=0", "--debug").stderr


def test_images_are_looked_for_beside_the_workflow(command, tmp_path, where):
    import torch

    images.save_png(torch.rand(16, 16, 3), tmp_path / "input" / "photo.png")
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "photo.png"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    (tmp_path / "load.json").write_text(json.dumps(graph))
    result = command("run", tmp_path / "load.json", "--out", tmp_path / "out")
    assert result.stdout.splitlines() == [str(tmp_path / "out" / "preview" / "preview_00001_.png")]


def test_nodes_lists_ours_and_core(command):
    result = command("nodes")
    assert result.exit_code == 0
    for name in ("RetortDistilledSetup", "KSampler", "SamplerCustomAdvanced", "CheckpointLoaderSimple"):
        assert name in result.stdout


def test_doctor_says_what_is_there_and_how_to_get_the_rest(command, where):
    result = command("doctor")
    assert result.exit_code == 0
    for word in ("Python", "torch", "device", "diffusers", "embedded model", "install.py link", "0 checkpoints"):
        assert word in " ".join(result.stdout.split())


def test_ctrl_c_ends_a_run_at_once_and_keeps_what_is_finished(command, written, api, tmp_path, monkeypatch):
    """The first picture is saved when the second sampler is interrupted, in the middle of its node."""
    from retort.graphs.core import sampling

    drawn, plain = [], sampling.KSampler.execute

    def execute(**inputs):
        drawn.append(inputs["seed"])
        if len(drawn) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        return plain(**inputs)

    monkeypatch.setattr(sampling.KSampler, "execute", execute)
    second = {"8": {**api["5"], "inputs": {**api["5"]["inputs"], "seed": 6}, "_meta": {"title": "Again"}},
              "9": {**api["6"], "inputs": {"samples": ["8", 0], "vae": ["1", 2]}},
              "10": {"class_type": "SaveImage", "inputs": {"images": ["9", 0], "filename_prefix": "late"}}}  # fmt: skip
    written.write_text(json.dumps(api | second))
    started = time.monotonic()
    result = command("run", written, "--out", tmp_path / "out")
    assert result.exit_code == 130 and "cancelled" in result.stderr and "Traceback" not in result.stderr
    assert time.monotonic() - started < 50 and drawn == [5, 6]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny_00001_.png"]


def test_arguments_of_comfyui_need_one(command, written, tmp_path):
    result = command("run", written, "--out", tmp_path / "out", "--", "--lowvram")
    assert result.exit_code == 2 and "--lowvram" in result.stderr
    wrong = command("run", written, "--comfyui", tmp_path)
    assert wrong.exit_code == 2 and "is no ComfyUI" in wrong.stderr
    for more in ((), ("--built-in",)):
        silent = command("run", written, "--out", tmp_path / "out", "--previews", *more)
        assert silent.exit_code == 2 and "--previews: only ComfyUI draws while it samples" in silent.stderr
    assert not (tmp_path / "out").exists()


def test_usage_mistakes_exit_with_2(command):
    assert command("run").exit_code == 2
    assert command("fly").exit_code == 2
