"""Folders of models as people have them, in ComfyUI: links, Windows' separators, and the same folders as ComfyUI's."""

from __future__ import annotations

import asyncio
import copy
import importlib

import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.integration

KINDS = ("checkpoints", "loras", "vae", "diffusion_models", "text_encoders", "rewards", "gaussian_statistics")


@pytest.fixture
def place(comfy, ours, tmp_path, monkeypatch):
    """A folder of models of ComfyUI's, whose files lie behind links on another disk."""
    folders = copy.deepcopy(comfy.folders.folder_names_and_paths)
    monkeypatch.setattr(comfy.folders, "folder_names_and_paths", folders)
    monkeypatch.setattr(comfy.folders, "filename_list_cache", {})
    disk = tmp_path / "disk"
    (disk / "far").mkdir(parents=True)
    save_file({"a.lora_up.weight": torch.ones(2, 1)}, disk / "far" / "Bold.safetensors")
    for kind in KINDS:
        here = tmp_path / "models" / kind
        (here / "style").mkdir(parents=True)
        (here / "far").symlink_to(disk / "far")
        (here / "style" / "one.safetensors").symlink_to(disk / "far" / "Bold.safetensors")
        (here / "gone.safetensors").symlink_to(disk / "nothing")
        comfy.folders.add_model_folder_path(kind, str(here), is_default=True)
    return tmp_path / "models"


def errors(prompt):
    """Input -> what ComfyUI says of it before it runs a prompt with this node, beside what is not connected."""
    check = importlib.import_module("execution").validate_inputs
    _, found, _ = asyncio.run(check("prompt", prompt, "1", {}))
    return {e["extra_info"]["input_name"]: e for e in found if e["type"] != "required_input_missing"}


def node(kind, **inputs):
    return {"1": {"class_type": kind, "inputs": inputs}}


def reflection(name):
    return node("RetortReflectionSetup", **{"pair": "lora", "pair.lora": name, "pair.strong_strength": 0.8,
                                            "pair.weak_strength": -1.5, "pair.reflecting_cfg": 1.0})  # fmt: skip


NAMED = {
    "pair.lora": reflection,
    "start_from": lambda name: node("RetortTrainFlow", start_from=name),
    "name": lambda name: node("RetortLoadGaussianStatistics", name=name),
}


@pytest.mark.parametrize("input", NAMED)
def test_names_with_either_separator_pass(place, input):
    for name in ("style/one.safetensors", "style\\one.safetensors", "far/Bold.safetensors", "far\\Bold.safetensors"):
        assert input not in errors(NAMED[input](name)), name
    for name in ("far\\bold.safetensors", "..\\far\\Bold.safetensors", "Bold.safetensors", "/etc/passwd", "far\\", ""):
        assert errors(NAMED[input](name))[input]["type"] == "value_not_in_list", name


def test_every_trainer_takes_them(comfy, place):
    takes = [kind for kind, cls in comfy.plugin.items()
             if any(one.id == "start_from" for one in cls.GET_SCHEMA().inputs)]  # fmt: skip
    assert len(takes) >= 6
    for kind in takes:
        assert "start_from" not in errors(node(kind, start_from="style\\one.safetensors")), kind


def test_linked_files_are_listed_and_read(ours, place):
    host = ours("hosts.comfyui.host").host
    assert {"far/Bold.safetensors", "style/one.safetensors"} <= set(host.lora_names())
    for name in ("far/Bold.safetensors", "far\\Bold.safetensors", "style\\one.safetensors"):
        assert list(host.read_lora(name)) == ["a.lora_up.weight"]
    for name, why in {
        "../x.safetensors": "leaves its folder", "..\\x.safetensors": "leaves its folder", "far/x.pt": "no safetensors",
        "C:\\x.safetensors": "leaves its folder", "/x.safetensors": "leaves its folder", "a\0.safetensors": "name",
        "gone.safetensors": "is a link to .* cannot be followed", "far\\bold.safetensors": "was not found. Put it into",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=why):
            host.read_lora(name)


def test_jobs_name_them_either_way(ours, place):
    files = ours("hosts.comfyui.model_files")
    for kind in ("checkpoints", "diffusion_models", "vae"):
        assert files.path_of(kind, "far\\Bold.safetensors") == place / kind / "far" / "Bold.safetensors"


def test_linked_rewards_and_statistics(ours, place):
    host, rewards, statistics = (ours(f"hosts.{name}") for name in ("comfyui.host", "rewards.files", "statistics"))
    (place / "rewards" / "far" / "config.json").write_text("{}")
    roots = host.host.rewards_folders()
    assert rewards.find(roots, "far", (), "a model").folder == place / "rewards" / "far"
    assert {"far", "style/one.safetensors"} <= set(rewards.names(roots))
    head = rewards.find_file(roots, "style\\one.safetensors", "usual", "the head")
    assert head == place / "rewards" / "style" / "one.safetensors"
    assert {"far/Bold.safetensors", "style/one.safetensors"} <= set(statistics.names(host.host.statistics_folders()))


CONFIG = """
a111:
    base_path: $BIG_DISK/webui
    checkpoints: models/Stable-diffusion
    loras: |
        models/Lora

        models/LyCORIS/../More
relative:
    base_path: near
    is_default: true
    unet: unet
    clip: te
    loras: mine
bare:
    vae: /vaes/
    loras: ~/x
    rewards: $BIG_DISK/judges
    gaussian_statistics: ../statistics
home:
    base_path: ~/ai
    loras: Lora
    diffusers: here
    is_default: yes
again:
    is_default: true
    base_path: $BIG_DISK/webui
    loras: models/Lora
empty:
"""


def test_extra_model_paths_are_read_as_comfyui_reads_them(comfy, ours, tmp_path, monkeypatch):
    monkeypatch.setenv("BIG_DISK", str(tmp_path / "disk"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    models, core = tmp_path / "models", comfy.folders
    usual = {
        kind: ([str(path) for path in ours("hosts.headless.folders").Folders(models=(models,)).own(kind)], set())
        for kind in (*KINDS, "diffusers")
    }
    (tmp_path / "extra_model_paths.yaml").write_text(CONFIG)
    monkeypatch.setattr(core, "folder_names_and_paths", usual)
    importlib.import_module("utils.extra_config").load_extra_path_config(str(tmp_path / "extra_model_paths.yaml"))
    found = ours("hosts.headless.folders").Folders(models=(models,))
    for kind in usual:
        assert [str(path) for path in found.own(kind)] == core.get_folder_paths(kind), kind
