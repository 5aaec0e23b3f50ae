"""The template that trains an edit model on pairs runs in ComfyUI as it is saved, with tiny files for its own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import snapshots
import torch
from safetensors.torch import load_file

from retort.files.pictures import save_png

pytest.importorskip("peft")
pytestmark = [pytest.mark.integration, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
(NAME,) = snapshots.OWN_PICTURES
# In place of the three files: a tiny network of the real class, an encoder that tells pictures and words apart, and a
# VAE whose latents are the means of its patches.
PACK = """
import torch
from retort.benchmarks.family_networks import families

class Network:
    def load(self, **_):
        return (families()["QwenImageEdit"].model(),)

class Words:
    def tokenize(self, text, images=(), **_):
        assert len(images) == bool(text), (text, len(images))
        return text, [float(image.mean()) for image in images]

    def encode_from_tokens_scheduled(self, tokens):
        text, means = tokens
        print("ENCODED", text, [round(mean, 2) for mean in means])
        found = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(sum(text.encode())))
        return [[found + sum(means), {}]]

class Encoder:
    def load(self, **_):
        return (Words(),)

class Means:
    patch = 64

    def encode(self, pixels):
        found = torch.nn.functional.avg_pool2d(pixels[..., :3].movedim(-1, 1), self.patch)
        return found.repeat(1, 6, 1, 1)[:, :16, None] * 2 - 1

    def decode(self, samples):
        return (samples[:, :3, 0].movedim(1, -1) / 2 + 0.5).clamp(0, 1)

class Pictures:
    def load(self, **_):
        return (Means(),)

NODE_CLASS_MAPPINGS = {}
for kind, made, choices in (("Network", "MODEL", 2), ("Encoder", "CLIP", 3), ("Pictures", "VAE", 1)):
    inputs = {f"choice_{number}": ("STRING", {"default": ""}) for number in range(choices)}
    node = type(f"Tiny{kind}", (globals()[kind],), {
        "INPUT_TYPES": classmethod(lambda cls, inputs=inputs: {"required": inputs}),
        "RETURN_TYPES": (made,), "FUNCTION": "load", "CATEGORY": "test",
    })
    NODE_CLASS_MAPPINGS[node.__name__] = node
"""
LOADERS = {"UNETLoader": "TinyNetwork", "CLIPLoader": "TinyEncoder", "VAELoader": "TinyPictures"}


@pytest.fixture
def base(tmp_path):
    """A base directory of ComfyUI's with the pack, and three pairs of pictures."""
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / "tiny_edit.py").write_text(PACK, encoding="utf-8")
    for number, name in enumerate(("one", "two", "three")):
        for folder, more in (("before", 0.0), ("after", 0.5)):
            place = tmp_path / "input" / "edits" / folder
            place.mkdir(parents=True, exist_ok=True)
            save_png(torch.full((64, 64, 3), 0.1 + number / 10 + more), place / f"{name}.png")
    (tmp_path / "input" / "edits" / "after" / "two.txt").write_text("make it night", encoding="utf-8")
    return tmp_path


def replaced(folder: Path) -> Path:
    """The template with other loaders, and two steps."""
    document = json.loads((REPOSITORY / "workflows" / f"{NAME}.json").read_text(encoding="utf-8"))
    for node in document["nodes"]:
        if node["type"] in LOADERS:
            node["type"] = LOADERS[node["type"]]
            for number, given in enumerate(node["inputs"]):
                given |= {"name": f"choice_{number}", "type": "STRING", "widget": {"name": f"choice_{number}"}}
        if node["type"] == "RetortTrainFlow":
            names = [given["name"] for given in node["inputs"] if "widget" in given]
            for name, value in {"steps": 2, "preview_every": 1, "warmup": 0, "learning_rate": 0.01, "rank": 2}.items():
                node["widgets_values"][names.index(name)] = value
    path = folder / "template.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def test_it_runs_and_each_picture_is_told_of_its_own(comfyui, base):
    command = [
        sys.executable, "-m", "retort.hosts.start", "run", str(replaced(base)), "--comfyui", str(comfyui),
        "--out", str(base / "out"), "--", "--base-directory", str(base), "--disable-api-nodes",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = base / "out" / "retort" / "my_edit"
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(math.isfinite(row["student_loss"]) for row in rows)
    assert (folder / "previews" / "step_0000002.png").is_file()
    lora = load_file(base / "models" / "loras" / "my_edit.safetensors")
    assert any(bool(value.any()) for key, value in lora.items() if "lora_up" in key or "lora_B" in key)
    # In the order of names; the text of the second, that of the node for the others.
    said = [line.split("ENCODED ")[1] for line in (done.stdout + done.stderr).splitlines() if "ENCODED" in line]
    words = ["Turn the photograph into a pencil drawing. [0.1]", "Turn the photograph into a pencil drawing. [0.3]"]
    assert {text.split("<|vision_end|>")[-1] for text in said} == {*words, "make it night [0.2]", " []"}
