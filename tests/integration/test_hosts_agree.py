"""The two hosts give the same latents: every bundled workflow with embedded files, and core's samplers and grids."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import snapshots
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

pytestmark = [pytest.mark.integration, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
WORKFLOWS = REPOSITORY / "workflows"
SAMPLES_NOTHING = "Train - What memory a training takes"
SAMPLES, TRAINERS = snapshots.SAMPLES, snapshots.TRAINERS
TRAINED_APART = 0.03  # of latents whose standard deviation is about 1
# Prints the prompt that the headless reader makes of a workflow, and leaves the latents of its samplers.
HEADLESS = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from retort.graphs import registry, workflow
from retort.hosts.headless.folders import Folders
from retort.graphs.run import run
import asyncio
torch.set_num_threads(1)
source, out, slots = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
prompt = workflow.read(source, asyncio.run(registry.everything())).prompt()
ids = {key: slots[node["class_type"]] for key, node in prompt.items() if node["class_type"] in slots}
done = run(source, where=Folders(inputs=(source.parent,), output=out), keep=ids).results.outputs
save_file({key: done[key][slot][0]["samples"].contiguous() for key, slot in ids.items()}, out / "latents.safetensors")
print(json.dumps(prompt))
"""
PROMPT_OF = """
import asyncio, json, sys
from pathlib import Path
from retort.graphs import registry, workflow
print(json.dumps(workflow.read(Path(sys.argv[1]), asyncio.run(registry.everything())).prompt()))
"""


def both(server, source: Path, folder: Path) -> dict[str, tuple]:
    """Latents (headless, ComfyUI) of every sampler node in a workflow file."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "COMFYUI_PATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HEADLESS, str(source), str(folder), json.dumps(SAMPLES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    prompt = json.loads(done.stdout.splitlines()[-1])
    ours = load_file(folder / "latents.safetensors")
    for key in ours:
        slot = SAMPLES[prompt[key]["class_type"]]
        inputs = {"samples": [key, slot], "filename_prefix": f"agree/{source.stem}_{key}"}
        prompt[f"save_{key}"] = {"class_type": "SaveLatent", "inputs": inputs}
    history = server.run(prompt)
    assert history["status"]["status_str"] == "success", history["status"]
    theirs = {}
    for key in ours:
        (saved,) = (server.base / "output" / "agree").glob(f"{source.stem}_{key}_*.latent")
        theirs[key] = load_file(saved)["latent_tensor"]
    return {key: (ours[key], theirs[key]) for key in ours}


def assert_equal(pairs: dict[str, tuple]) -> None:
    assert pairs
    for key, (ours, theirs) in pairs.items():
        assert ours.shape == theirs.shape, key
        assert float((ours - theirs).abs().max()) <= 1e-4, f"node {key}"
        assert float(ours.std()) > 0.1, f"node {key} gave nothing"


@pytest.mark.parametrize("name", [name for name in snapshots.names() if name not in {*TRAINERS, SAMPLES_NOTHING}])
def test_a_bundled_workflow(server, tmp_path, name):
    assert_equal(both(server, WORKFLOWS / f"{name}.json", tmp_path))


@pytest.mark.parametrize("name", TRAINERS)
def test_a_bundled_training(server, tmp_path, name):
    """Trained and sampled by either host; only the numbers that make it long are others than in the file."""
    document = snapshots.shortened(json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")), name)
    trainers = [node for node in document["nodes"] if node["type"] in TRAINERS[name]]
    assert len(trainers) == len(TRAINERS[name])
    source = tmp_path / f"{name}.json"
    source.write_text(json.dumps(document), encoding="utf-8")
    latents = both(server, source, tmp_path / "out")
    if name == "Restore - Train a restorer":  # its student restores, and samples nothing
        assert_equal(latents)
        return
    # The students are the last that the file samples.
    ordered = [latents[key] for key in sorted(latents, key=int)]
    before, students = ordered[: -len(trainers)], ordered[-len(trainers) :]
    for pair in before:
        assert_equal({"before": pair})
    for student in students:
        assert_learnt_alike(student, before)


def prompt_of(source: Path) -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "COMFYUI_PATH"}
    done = subprocess.run(
        [sys.executable, "-c", PROMPT_OF, str(source)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_photograph_of_ones_own_is_restored(server):
    picture = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 12), (72, 96), mode="bicubic")[0].movedim(0, -1)
    pixels = (picture.clamp(0, 1) * 255).byte().numpy()
    (server.base / "input").mkdir(exist_ok=True)
    Image.fromarray(pixels).save(server.base / "input" / "example.png")
    prompt = prompt_of(WORKFLOWS / f"{snapshots.RESTORES}.json")
    (photograph,) = (key for key, node in prompt.items() if node["class_type"] == "RetortDemoPhotograph")
    own = {"class_type": "LoadImage", "inputs": {"image": "example.png"}}
    # The photograph that comes with Retort, 451 x 300 before core halves it to 226 x 150, and then one's own.
    for size, node in (((452, 300), prompt[photograph]), ((96, 72), own)):
        history = server.run({**prompt, photograph: node})
        assert history["status"]["status_str"] == "success", history["status"]
        made = max((server.base / "output" / "retort").glob("restore_photograph*.png"))
        with Image.open(made) as image:
            assert image.size == size


# The headless host, which turns files into prompts here, knows no CLIPLoader; the page's test opens that one.
@pytest.mark.parametrize("name", sorted(snapshots.DOWNLOADS - {"PixArt - Restore with InstaRevive"}))
def test_a_workflow_without_its_files_is_refused_by_their_names(server, name):
    """Through /prompt as the other workflows: nothing but the files that it says to download is missing."""
    source = WORKFLOWS / f"{name}.json"
    prompt = prompt_of(source)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(server.url + "/prompt", json.dumps({"prompt": prompt}).encode(), timeout=60)
    errors = [error for node in json.load(refused.value)["node_errors"].values() for error in node["errors"]]
    # A reward's files are in folders that users name, which the node itself looks for.
    rewards = [error for error in errors if re.search("type .* to download", error["details"])]
    errors = [error for error in errors if error not in rewards]
    asked = [node for node in prompt.values() if node["class_type"] == "RetortReward"]
    assert {error["type"] for error in errors} == {"value_not_in_list"} and len(rewards) <= len(asked)
    nodes = json.loads(source.read_text(encoding="utf-8"))["nodes"]
    said = {model["name"] for node in nodes for model in node.get("properties", {}).get("models", [])}
    note = next(node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote")
    missing = {error["extra_info"]["received_value"] for error in errors}
    assert said <= missing and all(name in note for name in missing)


def assert_learnt_alike(student: tuple, before: list[tuple]) -> None:
    # ComfyUI's network has query, key and value in one layer and diffusers' in three, so their adapters are not the
    # same: losses agree from the same start, and what is learnt goes the same way.
    assert float((student[0] - student[1]).abs().max()) < TRAINED_APART
    for base in before:
        moved = [(after - untrained).flatten() for after, untrained in zip(student, base, strict=True)]
        assert min(float(m.abs().max()) for m in moved) > 0.01
        assert float(torch.cosine_similarity(*moved, dim=0)) > 0.8, float(torch.cosine_similarity(*moved, dim=0))


PROMPT = "a (thin:1.4) red (three) on white paper"


def graph(variant: str, sampler: str, scheduler: str, **changes) -> dict:
    """Text to image on the embedded model by core's KSampler, in API format."""
    inputs = {
        "model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0], "seed": 11, "steps": 8,
        "cfg": 3.0, "sampler_name": sampler, "scheduler": scheduler, "denoise": 1.0,
    }  # fmt: skip
    return {
        "1": {"class_type": "RetortEmbeddedModel", "inputs": {"variant": variant}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": PROMPT}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ""}},
        "4": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 80, "batch_size": 3}},
        "5": {"class_type": "KSampler", "inputs": inputs | changes},
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "agree"}},
    }  # fmt: skip


def image_to_image(variant: str, sampler: str) -> dict:
    """A picture file, encoded and sampled again from the middle of the grid."""
    changed = graph(variant, sampler, "simple", latent_image=["8", 0], denoise=0.5)
    load = {"class_type": "LoadImage", "inputs": {"image": "agree.png"}}
    encode = {"class_type": "VAEEncode", "inputs": {"pixels": ["4", 0], "vae": ["1", 2]}}
    return changed | {"4": load, "8": encode}


CASES = {
    **{
        f"{variant} {sampler} {scheduler}": graph(variant, sampler, scheduler)
        for variant in ("flow", "eps")
        for sampler, scheduler in (
            ("euler", "simple"),
            ("euler", "normal"),
            ("heun", "karras"),
            ("dpmpp_2m", "karras"),
            ("dpmpp_2m", "sgm_uniform"),
            ("euler_ancestral", "simple"),
            ("lcm", "sgm_uniform"),
        )
    },
    "flow cfg 1": graph("flow", "euler", "simple", cfg=1.0),
    "flow image to image": image_to_image("flow", "euler"),
    "eps image to image": image_to_image("eps", "dpmpp_2m"),
}


@pytest.mark.parametrize("case", CASES)
def test_core_sampling(server, tmp_path, case):
    source = tmp_path / f"{case.replace(' ', '_')}.json"
    source.write_text(json.dumps(CASES[case]), encoding="utf-8")
    for inputs in (tmp_path, server.base / "input"):
        inputs.mkdir(exist_ok=True)
        picture = Image.new("RGB", (64, 80), "gold")
        ImageDraw.Draw(picture).ellipse((18, 15, 46, 60), outline="navy", width=6)
        picture.save(inputs / "agree.png")
    assert_equal(both(server, source, tmp_path / "out"))
