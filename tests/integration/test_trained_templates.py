"""Templates that train a published model run in ComfyUI as they are saved, with tiny files for their own."""

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
# The runs of each.
RUNS = {
    "Qwen-Image - Train an edit on pairs": ("my_edit",),
    "SDXL - Make a 4-step LoRA of your checkpoint": ("my_4_step",),
    "Wan 2.2 - Train both networks on your pictures": ("my_wan_high_noise", "my_wan_low_noise"),
    "Z-Image - Train a style on your pictures": ("my_style",),
}
# In place of the files, by what they are called: a tiny network of the real class, an encoder that tells pictures and
# words apart, and a VAE whose latents are the means of its patches.
PACK = """
import torch
from retort.benchmarks.family_networks import families

FAMILIES = {"qwen_image_edit": "QwenImageEdit", "qwen_2.5_vl": "QwenImageEdit", "qwen_image_vae": "QwenImageEdit",
            "z_image": "ZImage", "qwen_3_4b": "ZImage", "ae": "ZImage", "sd_xl": "SDXL",
            "wan": "WAN21_T2V", "umt5": "WAN21_T2V"}

def family(file):
    return families()[next(name for begin, name in FAMILIES.items() if file.startswith(begin))]

class Words:
    def __init__(self, row):
        self.row = row

    def tokenize(self, text, images=(), **_):
        assert self.row.name != "QwenImageEdit" or len(images) == bool(text), (text, len(images))
        return text, [float(image.mean()) for image in images]

    def encode_from_tokens_scheduled(self, tokens):
        text, means = tokens
        print("ENCODED", text, [round(mean, 2) for mean in means])
        ((found, told),) = self.row.prompt(sum(text.encode()))
        return [[found + sum(means), told]]

class Means:
    patch = 64

    def __init__(self, row):
        self.row = row

    def encode(self, pixels):
        found = torch.nn.functional.avg_pool2d(pixels[..., :3].movedim(-1, 1), self.patch)
        found = found.repeat(1, 6, 1, 1)[:, :self.row.latent[0]] * 2 - 1
        return found.movedim(1, 0)[None] if len(self.row.latent) == 4 else found

    def decode(self, samples):
        flat = samples[:, :3].movedim(2, 1).flatten(0, 1) if samples.ndim == 5 else samples[:, :3]
        return (flat.movedim(1, -1) / 2 + 0.5).clamp(0, 1)

class Network:
    def load(self, choice_0, **_):
        return (family(choice_0).model(),)

class Encoder:
    def load(self, choice_0, **_):
        return (Words(family(choice_0)),)

class Pictures:
    def load(self, choice_0, **_):
        return (Means(family(choice_0)),)

class Whole:
    def load(self, choice_0, **_):
        row = family(choice_0)
        return row.model(), Words(row), Means(row)

NODE_CLASS_MAPPINGS = {}
for kind, made, choices in (("Network", ("MODEL",), 2), ("Encoder", ("CLIP",), 3), ("Pictures", ("VAE",), 1),
                            ("Whole", ("MODEL", "CLIP", "VAE"), 1)):
    inputs = {f"choice_{number}": ("STRING", {"default": ""}) for number in range(choices)}
    node = type(f"Tiny{kind}", (globals()[kind],), {
        "INPUT_TYPES": classmethod(lambda cls, inputs=inputs: {"required": inputs}),
        "RETURN_TYPES": made, "FUNCTION": "load", "CATEGORY": "test",
    })
    NODE_CLASS_MAPPINGS[node.__name__] = node
"""
LOADERS = {
    "UNETLoader": "TinyNetwork", "CLIPLoader": "TinyEncoder", "VAELoader": "TinyPictures",
    "CheckpointLoaderSimple": "TinyWhole",
}  # fmt: skip
QUICK = {
    "RetortTrainFlow": {"steps": 2, "preview_every": 1, "warmup": 0, "learning_rate": 0.01, "rank": 2},
    "RetortTrainDistillation": {
        "steps": 2, "preview_every": 1, "warmup": 0, "learning_rate": 0.01, "rank": 2, "method.ratio": 1, "previews": 1,
        "accumulation": 1,
    },
    "EmptyLatentImage": {"width": 64, "height": 64},
    "EmptySD3LatentImage": {"width": 128, "height": 128},
    "KSampler": {"steps": 2},
    "ImageScaleToTotalPixels": {"megapixels": 0.02, "resolution_steps": 64},
}  # fmt: skip


@pytest.fixture
def base(tmp_path):
    """A base directory of ComfyUI's with the pack, three pairs of pictures, and three pictures with captions."""
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / "tiny_files.py").write_text(PACK, encoding="utf-8")
    for number, name in enumerate(("one", "two", "three")):
        for folder, more in (("edits/before", 0.0), ("edits/after", 0.5), ("my_pictures", 0.2)):
            place = tmp_path / "input" / folder
            place.mkdir(parents=True, exist_ok=True)
            save_png(torch.full((64, 64 if number else 128, 3), 0.1 + number / 10 + more), place / f"{name}.png")
    (tmp_path / "input" / "edits" / "after" / "two.txt").write_text("make it night", encoding="utf-8")
    (tmp_path / "input" / "my_pictures" / "two.txt").write_text("a grey square", encoding="utf-8")
    return tmp_path


def replaced(folder: Path, name: str) -> Path:
    """The template with other loaders, and two steps of everything."""
    document = json.loads((REPOSITORY / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    for node in document["nodes"]:
        if node["type"] in LOADERS:
            node["type"] = LOADERS[node["type"]]
            for number, given in enumerate(node["inputs"]):
                given |= {"name": f"choice_{number}", "type": "STRING", "widget": {"name": f"choice_{number}"}}
        names = [given["name"] for given in node["inputs"] if "widget" in given]
        for widget, value in QUICK.get(node["type"], {}).items():
            node["widgets_values"][names.index(widget)] = value
    path = folder / "template.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", sorted(snapshots.TRAINED))
def test_it_runs(comfyui, base, name):
    command = [
        sys.executable, "-m", "retort.hosts.start", "run", str(replaced(base, name)), "--comfyui", str(comfyui),
        "--out", str(base / "out"), "--", "--base-directory", str(base), "--disable-api-nodes",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for run in RUNS[name]:
        folder = base / "out" / "retort" / run
        rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == 2 and all(math.isfinite(row["student_loss"]) for row in rows)
        assert (folder / "previews" / "step_0000002.png").is_file()
        # What opens its LoRA finds the nodes that the model, the prompts and the VAE came from.
        kept = json.loads((folder / "graph.json").read_text())
        trainer = kept["prompt"][kept["node"]]
        assert trainer["class_type"].startswith("RetortTrain") and trainer["inputs"]["name"] == run
        linked = {name: kept["prompt"][value[0]]["class_type"] for name, value in trainer["inputs"].items()
                  if isinstance(value, list) and name in ("model", "vae", "clip", "other_expert")}  # fmt: skip
        assert {"model", "vae"} <= set(linked) <= {"model", "vae", "clip", "other_expert"}
        assert set(linked.values()) <= set(LOADERS.values())
        lora = load_file(base / "models" / "loras" / f"{run}.safetensors")
        assert any(bool(value.any()) for key, value in lora.items() if "lora_up" in key or "lora_B" in key)
    drawn = [path.read_bytes() for path in sorted((base / "out").rglob("*_00001_.png"))]
    document = json.loads((REPOSITORY / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    assert len(drawn) == len({*drawn}) == [node["type"] for node in document["nodes"]].count("SaveImage")
    said = [line.split("ENCODED ")[1] for line in (done.stdout + done.stderr).splitlines() if "ENCODED" in line]
    if "edit" in name:
        # In the order of names; the text of the second, that of the node for the others.
        words = ["Turn the photograph into a pencil drawing. [0.1]", "Turn the photograph into a pencil drawing. [0.3]"]
        assert {text.split("<|vision_end|>")[-1] for text in said} == {*words, "make it night [0.2]", " []"}
    elif "your pictures" in name:
        assert {"a grey square []", " []"} <= {*said}
