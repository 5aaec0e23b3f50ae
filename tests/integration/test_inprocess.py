"""ComfyUI without its server: the same latents to the bit, packs of nodes, Ctrl-C, and mistakes in one sentence."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import snapshots
import torch
from PIL import Image
from safetensors.torch import load_file

pytestmark = [pytest.mark.integration, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
WORKFLOWS = REPOSITORY / "workflows"
IN_ONE_PROCESS = Path(__file__).with_name("in_one_process.py")
SAMPLING = [name for name in snapshots.names() if name != "Train - What memory a training takes"]
# A pack in one file: an old-style node with a choice and a seed, a route, and a node that takes its time.
PACK = '''
import time
import comfy.utils
import torch
from aiohttp import web
from server import PromptServer


@PromptServer.instance.routes.get("/one_file")
async def told(request):
    return web.json_response({})


class Flag:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"colour": (["red", "blue"],), "seed": ("INT", {"default": 0, "max": 9}),
                             "size": ("INT", {"default": 16, "min": 8, "max": 64})},
                "optional": {"wait": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 60.0})}}

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "draw", "test"

    def draw(self, colour, seed, size, wait=0.0):
        bar = comfy.utils.ProgressBar(max(1, int(wait * 20)))
        for _ in range(int(wait * 20)):
            time.sleep(0.05)
            bar.update(1)
        image = torch.zeros(1, size, size, 3)
        image[..., ["red", "green", "blue"].index(colour)] = 1.0 - seed / 10
        return (image,)


NODE_CLASS_MAPPINGS = {"OneFileFlag": Flag}
'''


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A base directory of ComfyUI's with the pack."""
    folder = tmp_path_factory.mktemp("packs")
    (folder / "custom_nodes").mkdir()
    (folder / "custom_nodes" / "one_file.py").write_text(PACK, encoding="utf-8")
    return folder


def start(comfyui: Path, base: Path, source: Path, out: Path, *more: str) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "retort.hosts.start", "run", str(source), "--comfyui", str(comfyui), "--out", str(out),
        *more, "--", "--base-directory", str(base), "--disable-api-nodes",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run_inside(
    comfyui: Path, out: Path, sources: list[Path], slots: dict[str, int], arguments: list[str] | None = None
) -> tuple[dict[str, dict], str]:
    """What came of workflows, by name, one after another in one process; and what that said on stderr."""
    environment = {k: v for k, v in os.environ.items() if k != "COMFYUI_PATH"} | {"OMP_NUM_THREADS": "1"}
    options = json.dumps({"slots": slots, "arguments": arguments or []})
    command = [sys.executable, str(IN_ONE_PROCESS), options, str(comfyui), str(out), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {told["name"]: told for told in map(json.loads, done.stdout.splitlines())}, done.stderr


def flag(colour: str, id: int, values: list, link: int) -> list[dict]:
    """A flag and the node that saves it, in UI format."""
    outputs = [{"name": "IMAGE", "type": "IMAGE", "links": [link]}]
    inputs = [{"name": "images", "type": "IMAGE", "link": link}]
    return [
        {"id": id, "type": "OneFileFlag", "mode": 0, "inputs": [], "outputs": outputs, "widgets_values": values},
        {"id": id + 1, "type": "SaveImage", "mode": 0, "inputs": inputs, "outputs": [], "widgets_values": [colour]},
    ]


@pytest.fixture
def workflow(tmp_path) -> Path:
    """Two flags in UI format; the second takes a minute."""
    nodes = [*flag("red", 1, ["red", 3, "randomize", 24], 1), *flag("blue", 3, ["blue", 0, "fixed", 16, 60.0], 2)]
    links = [[1, 1, 0, 2, 0, "IMAGE"], [2, 3, 0, 4, 0, "IMAGE"]]
    path = tmp_path / "flags.json"
    path.write_text(json.dumps({"nodes": nodes, "links": links, "version": 0.4}), encoding="utf-8")
    return path


def test_a_pack_of_one_file_runs(comfyui, base, workflow, tmp_path):
    going = start(comfyui, base, workflow, tmp_path / "out", "--set", "3.wait=0", "--set", "1.size=32")
    out, said = going.communicate(timeout=600)
    assert going.returncode == 0, said[-3000:]
    saved = [Path(line) for line in out.splitlines()]
    assert sorted(path.name for path in saved) == ["blue_00001_.png", "red_00001_.png"]
    with Image.open(tmp_path / "out" / "red_00001_.png") as image:
        assert image.size == (32, 32) and image.getpixel((0, 0)) == (178, 0, 0)
        # The picture carries the workflow with the change, as ComfyUI's own do.
        assert json.loads(image.text["prompt"])["1"]["inputs"]["size"] == 32
        assert json.loads(image.text["workflow"])["nodes"][0]["widgets_values"][3] == 32
    assert "2 images in" in said and "Traceback" not in said


def test_ctrl_c_keeps_what_is_finished(comfyui, base, workflow, tmp_path):
    going = start(comfyui, base, workflow, tmp_path / "out")
    first, limit = tmp_path / "out" / "red_00001_.png", time.monotonic() + 600
    while not first.is_file() and going.poll() is None and time.monotonic() < limit:
        time.sleep(0.2)
    time.sleep(2)  # the second flag is being drawn
    going.send_signal(signal.SIGINT)
    out, said = going.communicate(timeout=100)
    assert going.returncode == 130, said[-3000:]
    assert out.splitlines() == [str(first)] and "1 images in" in said and "cancelled" in said
    assert "Traceback" not in said
    with Image.open(first) as image:
        image.load()
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == [first.name]


def test_what_nodes_show_while_they_work_is_kept_on_request(comfyui, base, tmp_path):
    graph = {
        "1": {"class_type": "RetortEmbeddedModel", "inputs": {"variant": "flow"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red seven", "clip": ["1", 1]}},
        "3": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "../far": {"class_type": "KSampler", "inputs": {
            "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["3", 0], "seed": 1,
            "steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
        }},
        "5": {"class_type": "SaveLatent", "inputs": {"samples": ["../far", 0], "filename_prefix": "x"}},
    }  # fmt: skip
    (tmp_path / "w.json").write_text(json.dumps(graph), encoding="utf-8")
    for name, more in (("silent", ()), ("shown", ("--previews",))):
        going = start(comfyui, base, tmp_path / "w.json", tmp_path / name, *more)
        _, said = going.communicate(timeout=600)
        assert going.returncode == 0, said[-3000:]
    assert not (tmp_path / "silent" / "preview").exists() and not list(tmp_path.glob("*.jpg"))
    (shown,) = (tmp_path / "shown" / "preview").iterdir()
    assert shown.name == "node____far.jpg"
    with Image.open(shown) as image:
        assert image.format == "JPEG" and image.size[0] == image.size[1] > 1
        image.load()
    one, other = (load_file(next((tmp_path / name).glob("*.latent"))) for name in ("silent", "shown"))
    assert torch.equal(one["latent_tensor"], other["latent_tensor"])


def test_a_comfyui_that_does_not_start_says_why(comfyui, workflow, tmp_path):
    going = start(comfyui, tmp_path / "nowhere", workflow, tmp_path / "out")
    _, said = going.communicate(timeout=600)
    assert going.returncode == 2 and "does not start: FileNotFoundError" in said and "nowhere" in said
    assert "Traceback" not in said and not (tmp_path / "out").exists()


def test_processes_of_accelerate_share_the_prompts(comfyui, base, tmp_path):
    prompts = ["a blue seven on yellow paper", "a red three on white paper", "a green one on black paper"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    source = WORKFLOWS / "4 Search for a better picture.json"
    graph = json.loads(source.read_text(encoding="utf-8"))
    ids = {node["type"]: node["id"] for node in graph["nodes"]}
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    for name, more in (("alone", ["-m"]), ("shared", [*launch, "--module"])):
        command = [
            sys.executable, *more, "retort.hosts.start", "search", str(source), str(tmp_path / "prompts.txt"),
            "--comfyui", str(comfyui), "--out", str(tmp_path / name),
            "--set", f"{ids['RetortTreeSearch']}.calls=12", "--set", f"{ids['BasicScheduler']}.steps=2",
            "--", "--base-directory", str(base), "--disable-api-nodes",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
        assert all(done.stdout.count(prompt) == 1 for prompt in prompts), done.stdout
    pictures = {}
    for name in ("alone", "shared"):
        for path in (tmp_path / name).rglob("retort/**/*.png"):
            with Image.open(path) as image:
                pictures.setdefault(str(path.relative_to(tmp_path / name)), []).append(image.tobytes())
    assert len(pictures) >= 3 and all(len(pair) == 2 and pair[0] == pair[1] for pair in pictures.values())
    for number, prompt in enumerate(prompts):
        told = json.loads((tmp_path / "shared" / f"{number:04d}" / "result.json").read_text(encoding="utf-8"))
        assert told["prompt"] == prompt


def test_each_run_of_a_session_writes_into_its_own_folder(comfyui, base, tmp_path):
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 255}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
        "3": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    # The same workflow three times, and another one whose nodes have the same ids.
    graphs = {"one": graph, "two": graph, "three": graph}
    graphs["four"] = {**graph, "1": {**graph["1"], "inputs": {**graph["1"]["inputs"], "color": 0}}}
    for name, one in graphs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(one), encoding="utf-8")
    sources = [tmp_path / f"{name}.json" for name in graphs]
    for more in ([], ["--cache-none"]):
        out = tmp_path / "_".join(["out", *more])
        told, errors = run_inside(comfyui, out, sources, {}, ["--base-directory", str(base), *more])
        for name in graphs:
            assert all(Path(path).is_file() for path in told[name]["saved"]), (more, told[name])
            files = sorted(path.name for path in (out / name).rglob("*.*"))
            assert files[1] == "x_00001_.png" and len(files) == 2, (more, name, files)
        assert "Traceback" not in errors


MISTAKES = {
    "small": ((3, 5), 'node 1 "OneFileFlag", input "size": it must be at least 8 (got 5). Allowed: 8 to 64.'),
    "choice": ((0, "green"), "input \"colour\": this is not one of its choices (got 'green'). Choose red, blue."),
    "kind": ((3, "wide"), "INT"),
    "few": ((4, -1.0), "it must be at least 0.0 (got -1.0)"),
}


def test_mistakes_are_one_sentence_each(comfyui, base, workflow, tmp_path):
    document = json.loads(workflow.read_text(encoding="utf-8"))
    document["nodes"][0]["widgets_values"].append(0.0)
    for name, ((at, value), _) in MISTAKES.items():
        changed = json.loads(json.dumps(document))
        changed["nodes"][0]["widgets_values"][at] = value
        (tmp_path / f"{name}.json").write_text(json.dumps(changed), encoding="utf-8")
    sources = [tmp_path / f"{name}.json" for name in MISTAKES]
    told, errors = run_inside(comfyui, tmp_path, sources, {}, ["--base-directory", str(base)])
    for name, (_, sentence) in MISTAKES.items():
        assert sentence in told[name]["error"] and "\n" not in told[name]["error"], told[name]
    assert "Traceback" not in errors and "Failed to validate" not in errors
    assert not list(tmp_path.rglob("*.png"))


def test_a_missing_file_is_named(comfyui, base, tmp_path):
    graph = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "far.safetensors"}},
        "2": {"class_type": "EmptyImage", "inputs": {"width": 16, "height": 16, "batch_size": 1, "color": 0}},
        "3": {"class_type": "VAEEncode", "inputs": {"pixels": ["2", 0], "vae": ["1", 2]}},
        "4": {"class_type": "SaveLatent", "inputs": {"samples": ["3", 0], "filename_prefix": "x"}},
    }
    (tmp_path / "far.json").write_text(json.dumps(graph), encoding="utf-8")
    told, _ = run_inside(comfyui, tmp_path, [tmp_path / "far.json"], {}, ["--base-directory", str(base)])
    said = told["far"]["error"]
    assert "this file is not there (got 'far.safetensors')" in said and "retort doctor" in said and "\n" not in said


def test_a_missing_class_is_named(comfyui, base, workflow, tmp_path):
    workflow.write_text(workflow.read_text(encoding="utf-8").replace("OneFileFlag", "OneFileFlog"), encoding="utf-8")
    going = start(comfyui, base, workflow, tmp_path / "out")
    _, said = going.communicate(timeout=600)
    assert going.returncode == 2 and "'OneFileFlog' is not known to the ComfyUI in" in said
    assert "Did you mean OneFileFlag" in said


@pytest.fixture(scope="session")
def inside(comfyui, tmp_path_factory) -> dict[str, dict]:
    """What came of all workflows that run anywhere, one after another in one process; trainings of two steps."""
    folder = tmp_path_factory.mktemp("inside")
    for name in SAMPLING:
        document = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
        (folder / f"{name}.json").write_text(json.dumps(snapshots.shortened(document, name)), encoding="utf-8")
    told, _ = run_inside(comfyui, folder, [folder / f"{name}.json" for name in SAMPLING], snapshots.SAMPLES)
    return {"folder": folder, **told}


@pytest.mark.parametrize("name", SAMPLING)
def test_latents_equal_the_servers_to_the_bit(server, inside, name):
    told = inside[name]
    assert "error" not in told, told["error"]
    history = server.run(told["prompt"], seconds=1200)
    assert history["status"]["status_str"] == "success", history["status"]
    mine = sorted((inside["folder"] / name / "in_one").glob("*.latent"))
    assert mine
    for path in mine:
        pair = path, server.base / "output" / "in_one" / path.name
        ours, theirs = (load_file(one)["latent_tensor"] for one in pair)
        assert torch.equal(ours, theirs), path.name
