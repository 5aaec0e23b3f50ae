"""`.ci/comfyui.py`: the names of ComfyUI that we lean on, and what a checkout lacks of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_spec = importlib.util.spec_from_file_location("ci_comfyui", ROOT / ".ci" / "comfyui.py")
assert _spec is not None and _spec.loader is not None
names = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(names)

USES = """
import comfy.sd
import folder_paths as paths
from comfy.samplers import CFGGuider, Gone
import importlib

def f(model):
    nodes = importlib.import_module("nodes")
    comfy.sd.load(1), comfy.sd.lost(2), paths.models_dir, nodes.NODES, paths.__file__
    return CFGGuider.sample, CFGGuider.vanished, model.comfy.sd.never
"""
COMFYUI = {
    "comfy/sd.py": "def load(x): ...",
    "comfy/samplers.py": "class Base:\n    def sample(self): ...\nclass CFGGuider(Base):\n    pass",
    "folder_paths.py": "try:\n    models_dir = 1\nexcept OSError:\n    pass",
    "nodes.py": "NODES: dict = {}",
}


@pytest.fixture
def trees(tmp_path):
    """A folder of ours that uses ComfyUI, and a checkout."""
    for name, text in {"ours/hosts/use.py": USES, **{f"theirs/{k}": v for k, v in COMFYUI.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / "ours", tmp_path / "theirs"


def test_names_are_read_from_imports_and_from_what_is_asked_of_them(trees):
    found = names.leant_on(trees[0])
    assert {"comfy.sd", "comfy.sd.load", "comfy.sd.lost", "folder_paths.models_dir", "comfy.samplers.Gone",
            "comfy.samplers.CFGGuider.sample", "nodes.NODES"} <= set(found)  # fmt: skip
    assert found["comfy.sd.lost"] == "hosts/use.py:9"
    assert not any("never" in name or "__" in name for name in found)


def test_what_a_checkout_lacks_is_named(trees, monkeypatch):
    """Names of modules, in branches too; members of classes, those of their bases among them; whole objects."""
    monkeypatch.setattr(names, "OBJECTS", {"comfy.samplers.CFGGuider": ("sample", "cfg"), "comfy.sd.VAE": ("decode",)})
    ours, theirs = trees
    assert set(names.missing(theirs, ours)) == {
        "comfy.sd.lost", "comfy.samplers.Gone", "comfy.samplers.CFGGuider.vanished", "comfy.samplers.CFGGuider.cfg",
        "comfy.sd.VAE",
    }  # fmt: skip


def test_the_list_of_objects_holds_what_we_use():
    assert names.unspelt(ROOT) == []


@pytest.mark.integration
def test_nothing_is_gone_from_this_comfyui(comfyui):
    assert names.missing(comfyui) == {}
