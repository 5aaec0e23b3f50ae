"""What a page may do with a run that has ended."""

from __future__ import annotations

import io
import json
import os
import zipfile

import pytest

from retort.hosts.jobs import manage
from retort.trainers.job_watch import Status, write_status
from retort.trainers.loop import CONFIG
from retort.trainers.watch import METRICS


@pytest.fixture
def runs(tmp_path):
    run = tmp_path / "runs" / "mine"
    (run / "previews").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    (run / METRICS).write_text('{"step": 1, "student_loss": 0.5}\n')
    (run / CONFIG).write_text(json.dumps({"method": "tdm", "training": {"steps": 9}}))
    (run / "previews" / "step_0000001.png").write_bytes(b"picture")
    (run / "checkpoints" / "step_0000001.safetensors").write_bytes(b"large")
    write_status(run, Status("finished", 9, 9, lora="mine.safetensors"))
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "mine.safetensors").write_bytes(b"lora")
    return tmp_path / "runs"


def test_a_run_is_deleted_and_its_lora_stays(runs):
    manage.delete(runs, "mine")
    assert not (runs / "mine").exists() and (runs.parent / "loras" / "mine.safetensors").is_file()


def test_a_run_gets_another_name(runs):
    manage.rename(runs, "mine", "yours")
    assert not (runs / "mine").exists() and (runs / "yours" / METRICS).is_file()
    (runs / "mine").mkdir()
    with pytest.raises(ValueError, match="there is a run called 'mine' already"):
        manage.rename(runs, "yours", "mine")


def test_a_run_that_goes_on_is_left_alone(runs):
    write_status(runs / "mine", Status("running", 1, 9, machine="another"))
    for work in (lambda: manage.delete(runs, "mine"), lambda: manage.rename(runs, "mine", "yours")):
        with pytest.raises(ValueError, match="the run mine goes on: stop it first"):
            work()
    assert (runs / "mine" / METRICS).is_file()


@pytest.mark.parametrize("name", ["..", "../mine", "/etc", "a/b", "", "C:\\x", "\0"])
def test_names_that_lead_elsewhere_are_refused(runs, name):
    for work in (
        lambda: manage.delete(runs, name), lambda: manage.rename(runs, name, "x"),
        lambda: manage.rename(runs, "mine", name), lambda: manage.export(runs, runs.parent / "loras", name),
    ):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError)):
            work()
    assert (runs / "mine" / METRICS).is_file()


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_nothing_behind_a_link_is_deleted_or_taken(runs, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "step_0000002.png").write_bytes(b"secret")
    (runs / "mine" / "previews" / "step_0000002.png").symlink_to(secret / "step_0000002.png")
    with pytest.raises(ValueError, match="link"):
        manage.delete(runs, "mine")
    assert (secret / "step_0000002.png").is_file() and (runs / "mine" / METRICS).is_file()
    with manage.export(runs, tmp_path / "loras", "mine") as file:
        assert b"secret" not in file.read()


def test_an_export_has_the_lora_the_settings_the_pictures_and_a_card(runs, tmp_path):
    with manage.export(runs, tmp_path / "loras", "mine") as file:
        archive = zipfile.ZipFile(io.BytesIO(file.read()))
    assert set(archive.namelist()) == {
        f"mine/{name}"
        for name in (CONFIG, METRICS, "previews/step_0000001.png", "mine.safetensors", "README.md")
    }
    assert archive.read("mine/mine.safetensors") == b"lora"
    text = archive.read("mine/README.md").decode()
    assert "method tdm, 9 steps" in text and '"method": "tdm"' in text


def test_a_card_shows_the_last_preview_and_how_it_was_drawn():
    told = {"sampling": {"steps": 20, "cfg": 4.0}, "preview": "previews/step_0000200.png"}
    text = manage.card("mine", told, {})
    assert "drawn in 20 steps at cfg 4, at strength 1." in text
    assert "![What it draws](previews/step_0000200.png)" in text
    for strange in ("../x.png", "previews/step_1.png) [x](http://y", None, "http://x/step_1.png"):
        assert "What it draws" not in manage.card("mine", {"preview": strange}, {})


def test_a_card_names_the_files_that_the_training_was_connected_to(runs, tmp_path):
    """Those of the model first, also where several make it; a stranger's names stay on their line."""
    prompt = {
        "1": {"class_type": "VAELoader", "inputs": {"vae_name": "ae.safetensors\n# no title"}},
        "2": {"class_type": "CLIPLoader", "inputs": {"clip_name": "qwen.safetensors", "type": "lumina2"}},
        "3": {"class_type": "UNETLoader", "inputs": {"unet_name": "z_image.gguf", "weight_dtype": "default"}},
        "4": {"class_type": "RetortTrainFlow", "inputs": {"vae": ["1", 0], "clip": ["2", 0], "model": ["3", 0]}},
        "5": {"class_type": "VAELoader", "inputs": {"vae_name": "other.safetensors"}},
    }
    graph = {"node": "4", "prompt": {id: prompt[id] for id in "1234"}}
    (runs / "mine" / "graph.json").write_text(json.dumps(graph), encoding="utf-8")
    with manage.export(runs, tmp_path / "loras", "mine") as file:
        text = zipfile.ZipFile(io.BytesIO(file.read())).read("mine/README.md").decode()
    assert 'base_model: "z_image.gguf"' in text and "other" not in text and "\n# no title" not in text
    assert "It was trained with z_image.gguf, qwen.safetensors." in text
    text = manage.card("mine", {"base": {"kind": "embedded", "variant": "flow"}}, {})
    assert 'base_model: "Retort Demo Model (flow)"' in text
    text = manage.card("mine", {"base": {"kind": "checkpoint", "file": "sd.safetensors"}}, {})
    assert 'base_model: "sd.safetensors"' in text
    text = manage.card("mine", {"size": [1024, 768]}, {}, ["z_image.gguf"])
    assert "Its first picture has 1024 x 768 pixels." in text


def test_a_card_says_base_steps_and_prompt_on_one_line():
    told = {"method": "dmd2", "step": 100, "base": {"checkpoint": "sd.safetensors"}, "timesteps": [999, 499.5],
            "prompt": "a zero\n> not a quote"}  # fmt: skip
    text = manage.card("mine", told, {})
    assert 'base_model: "sd.safetensors"' in text and "in 2 steps, at the timesteps 999, 499.5" in text
    assert "> a zero > not a quote\n" in text


def test_a_checkpoint_is_kept_among_the_loras(runs):
    """It is copied whole, under a name that nothing has; the run keeps its own."""
    loras = runs.parent / "loras"
    assert manage.keep(runs, loras, "mine", 1, "the best") == "the best.safetensors"
    assert (loras / "the best.safetensors").read_bytes() == b"large"
    assert (runs / "mine" / "checkpoints" / "step_0000001.safetensors").is_file()
    with pytest.raises(ValueError, match="there is a LoRA called 'mine' already"):
        manage.keep(runs, loras, "mine", 1, "mine")
    assert (loras / "mine.safetensors").read_bytes() == b"lora"
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 7"):
        manage.keep(runs, loras, "mine", 7, "another")
    assert sorted(path.name for path in loras.iterdir()) == ["mine.safetensors", "the best.safetensors"]


@pytest.mark.parametrize("name", ["..", "../x", "/etc/x", "a/b", "", "C:\\x", "\0", "con"])
def test_a_checkpoint_is_kept_nowhere_else(runs, name):
    with pytest.raises(ValueError, match="name"):
        manage.keep(runs, runs.parent / "loras", "mine", 1, name)
    with pytest.raises((ValueError, FileNotFoundError)):
        manage.keep(runs, runs.parent / "loras", name, 1, "x")


def test_a_checkpoint_that_is_a_link_is_not_followed(runs):
    secret = runs.parent / "secret"
    secret.write_text("secret")
    link = runs / "mine" / "checkpoints" / "step_0000002.safetensors"
    link.symlink_to(secret)
    with pytest.raises((ValueError, OSError)):
        manage.keep(runs, runs.parent / "loras", "mine", 2, "x")
    assert not (runs.parent / "loras" / "x.safetensors").exists()
