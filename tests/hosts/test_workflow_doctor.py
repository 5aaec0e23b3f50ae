"""`retort doctor WORKFLOW`: what it would run on, which nodes and files are missing and where they go."""

from __future__ import annotations

import json

import pytest

from retort.files.errors import UsageError
from retort.graphs.declared import Declared
from retort.hosts import workflow_doctor
from retort.hosts.inprocess.find import find

INFO = {
    "CheckpointLoaderSimple": {
        "input": {"required": {"ckpt_name": [["there.safetensors"], {}]}},
        "output": ["MODEL"], "output_is_list": [False], "output_name": ["MODEL"],
    },
    "SaveImage": {
        "input": {"required": {"images": ["*"]}}, "output": [], "output_is_list": [], "output_name": [],
        "output_node": True,
    },
}  # fmt: skip


@pytest.fixture
def written(tmp_path, ui_node):
    def write(name, *more):
        loader = ui_node(1, "CheckpointLoaderSimple", outputs=["MODEL"], values=[name])
        model = {"name": "far.safetensors", "url": "https://example.org/far.safetensors", "directory": "checkpoints"}
        loader["properties"]["models"] = [model]
        strange = ui_node(2, "Sparkle", [("x", "MODEL", 1)], ["IMAGE"])
        strange["properties"]["cnr_id"] = "comfyui-sparkle"
        save = ui_node(3, "SaveImage", [("images", "IMAGE", 2)])
        links = [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 3, 0, "IMAGE"]]
        if not more:
            links = [[2, 1, 0, 3, 0, "MODEL"]]
        path = tmp_path / "workflow.json"
        path.write_text(json.dumps({"nodes": [loader, save, *(strange for _ in more)], "links": links}))
        return path

    return write


def said(path):
    known = Declared(INFO, INFO.__getitem__, "it")
    rows = workflow_doctor.examine(path, known, "the host", lambda options: "of its kind")
    return [(row.name, row.ok, row.detail, row.remedy) for row in rows]


def test_nothing_is_missing(written):
    rows = said(written("there.safetensors"))
    assert rows[0][:3] == ("runs on", True, "the host") and all(row[1] for row in rows)


def test_a_missing_file_is_named_with_its_folder_and_address(written):
    (row,) = [row for row in said(written("far.safetensors")) if not row[1]]
    assert row[0] == "file" and "far.safetensors" in row[2] and "ckpt_name" in row[2]
    assert "folder checkpoints from https://example.org" in row[3]


def test_a_missing_class_is_named_with_its_pack(written):
    (row,) = [row for row in said(written("there.safetensors", "strange")) if not row[1]]
    assert row[0] == "node" and "Sparkle" in row[2] and "node 2" in row[2] and "comfyui-sparkle" in row[3]


def test_the_comfyui_is_the_one_that_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    assert find() is None
    for part in ("comfy/samplers.py", "execution.py"):
        (tmp_path / "there" / part).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / part).touch()
    assert find(tmp_path / "there") == tmp_path / "there"
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "there"))
    assert find() == tmp_path / "there"
    with pytest.raises(UsageError, match="--comfyui.*is no ComfyUI"):
        find(tmp_path)
