"""ComfyUI's own `basic_*` templates by `retort run`, on its nodes: files of models are stood in for by tiny ones."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.integration, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
IN_ONE_PROCESS = Path(__file__).with_name("in_one_process.py")
# How many pictures each saves or shows, as the editor queues it.
PICTURES = {
    "basic_datatype_conversion": 0,
    "basic_image_color_adjustment": 33,
    "basic_mask_operations_and_compositing": 18,
    "basic_switch_node": 1,
}
# Shaders need a graphics driver; Mesa's for the processor will do (Debian's mesa-vulkan-drivers).
SHADERS = "basic_image_color_adjustment"


def text_encoder() -> dict[str, torch.Tensor]:
    """CLIP-L, the smallest text encoder that core loads, with random weights."""
    draws = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(shape, generator=draws)).half()

    state = {"embeddings.token_embedding.weight": random(49408, 768)}
    state |= {"embeddings.position_embedding.weight": random(77, 768)}
    layers = {"mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
    layers |= {f"self_attn.{name}_proj": (768, 768) for name in ("q", "k", "v", "out")}
    for at in range(12):
        for name, (rows, columns) in layers.items():
            state[f"encoder.layers.{at}.{name}.weight"] = random(rows, columns)
            state[f"encoder.layers.{at}.{name}.bias"] = random(rows)
    for name in ("final_layer_norm", *(f"encoder.layers.{at}.layer_norm{one}" for at in range(12) for one in (1, 2))):
        state |= {f"{name}.weight": torch.ones(768).half(), f"{name}.bias": random(768)}
    return {f"text_model.{name}": tensor for name, tensor in state.items()}


def stand_ins(models: Path) -> None:
    """The files that the template of the switch names: the embedded flow with room for CLIP-L's vectors."""
    for kind in ("diffusion_models", "text_encoders", "vae", "loras"):
        (models / kind).mkdir(parents=True)
    flow = load_file(REPOSITORY / "models" / "checkpoints" / "digits_flow.safetensors")
    parts = {
        part: {name.removeprefix(part): value for name, value in flow.items() if name.startswith(part)}
        for part in ("model.diffusion_model.", "first_stage_model.")
    }
    network = parts["model.diffusion_model."]
    for name in ("context_embedder.weight", "y_embedder.mlp.0.weight"):
        network[name] = network[name].repeat(1, 768 // network[name].shape[1])
    save_file(network, models / "diffusion_models" / "z_image_turbo_bf16.safetensors")
    save_file(parts["first_stage_model."], models / "vae" / "ae.safetensors")
    save_file(text_encoder(), models / "text_encoders" / "qwen_3_4b.safetensors")
    lora = {
        name: value
        for name, value in load_file(REPOSITORY / "models" / "loras" / "digits_flow_bold.safetensors").items()
        if "embedder" not in name
    }
    save_file(lora, models / "loras" / "pixel_art_style_z_image_turbo.safetensors")


@pytest.fixture(scope="module")
def told(comfyui, tmp_path_factory) -> dict[str, dict]:
    """What came of each template, all in one process."""
    package = importlib.util.find_spec("comfyui_workflow_templates_json")
    if package is None or not package.submodule_search_locations:
        pytest.skip("comfyui-workflow-templates-json is not installed")
    base = tmp_path_factory.mktemp("official")
    for name in ("custom_nodes", "input", "workflows"):
        (base / name).mkdir()
    shutil.copy(comfyui / "input" / "example.png", base / "input")
    stand_ins(base / "models")
    for name in PICTURES:
        source = Path(package.submodule_search_locations[0]) / "templates" / f"{name}.json"
        document = json.loads(source.read_text(encoding="utf-8"))
        for content in document.get("definitions", {}).get("subgraphs", []):
            for node in content["nodes"]:
                if node["type"] == "EmptySD3LatentImage":
                    node["widgets_values"] = [64, 64, 1]
        (base / "workflows" / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    options = json.dumps({"slots": {}, "arguments": ["--base-directory", str(base)]})
    sources = [str(base / "workflows" / f"{name}.json") for name in PICTURES]
    done = subprocess.run(
        [sys.executable, str(IN_ONE_PROCESS), options, str(comfyui), str(base / "out"), *sources],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {one["name"]: one for one in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", PICTURES)
def test_a_basic_template_runs(told, name):
    found = told[name]
    if name == SHADERS and "Failed to initialize EGL" in found.get("error", ""):
        pytest.skip("no graphics driver for shaders")
    assert "error" not in found, found["error"]
    assert len(found["saved"]) == PICTURES[name]
    for path in found["saved"]:
        with Image.open(path) as image:
            image.load()
    if name == "basic_datatype_conversion":
        assert {"1.5", "0", "True", "1"} <= set(found["texts"])
