"""Restoration in real ComfyUI: core's own sampling sees the clean latent, and both hosts give the same pictures."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.integration

# Runs the same nodes without ComfyUI, and leaves their pictures.
HEADLESS = """
import json, sys
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file, save_file
from retort.hosts import api
from retort.nodes import NODES
nodes = {node.__name__: node for node in NODES}
given = load_file(sys.argv[1])
out = {}
for name, case in json.loads(sys.argv[2]).items():
    model, clip, vae = api.host.embedded(case["variant"])
    if "lora" in case:
        model = api.host.with_lora(model, case["lora"], 1.0)
    inputs = dict(case["inputs"])
    if "guided" in case:
        guided = nodes["RetortSpectralGuidance"].execute(model, vae, given["image"][:1, :64, :64], **case["guided"])
        model = guided.args[0]
    if inputs.pop("masked", False):
        inputs["mask"] = given["mask"]
    image = given["image"][:, :64, :64] if "guided" in case else given["image"]
    out[name] = nodes["RetortRestore"].execute(model, clip, vae, image, **inputs).args[0].contiguous()
save_file(out, sys.argv[3])
"""
TILES = {"scale": 1.5, "tile": 64, "overlap": 16, "caption": "a red three on white paper"}
FLOW, EPS = "digits_flow_dmd2_1step.safetensors", "digits_eps_dmd2_1step.safetensors"
CASES = {
    "flow": {"variant": "flow", "lora": FLOW, "inputs": TILES},
    "eps": {"variant": "eps", "lora": EPS, "inputs": TILES},
    "whole": {"variant": "flow", "lora": FLOW, "inputs": {"scale": 1.0, "tile": 0, "colour_fix": "adain"}},
    "tile captions": {
        "variant": "flow", "lora": FLOW,
        "inputs": TILES | {"tile_captions": "a blue one\n\na four\na red six\na\nb", "tile_strength": 0.5,
                           "window": "cosine"},
    },
    "mask": {"variant": "eps", "lora": EPS, "inputs": TILES | {"masked": True, "timestep": 300}},
    "photographs": {
        "variant": "photographs",
        "inputs": {"scale": 2.0, "tile": 64, "overlap": 24, "caption": "colour photograph, (face:1.3) of an animal"},
    },
    "guided": {
        "variant": "flow", "lora": FLOW, "guided": {"scale": 0.7},
        "inputs": {"scale": 1.0, "tile": 64, "overlap": 8, "caption": "a red three"},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def given():
    generator = torch.Generator().manual_seed(2)
    small = torch.rand(2, 3, 9, 11, generator=generator)
    image = torch.nn.functional.interpolate(small, (71, 90), mode="bicubic").clamp(0, 1).movedim(1, -1).contiguous()
    mask = torch.zeros(71, 90)
    mask[10:30, 15:40] = 1
    return {"image": image, "mask": mask}


@pytest.fixture(scope="module")
def headless(given, tmp_path_factory):
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("restored")
    save_file(given, folder / "given.safetensors")
    environment = {k: v for k, v in os.environ.items() if k != "COMFYUI_PATH"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HEADLESS, str(folder / "given.safetensors"), json.dumps(CASES),
               str(folder / "out.safetensors")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "out.safetensors")


def loaded(comfy, case):
    host = importlib.import_module(f"{comfy.package}.hosts.comfyui.host").host
    model, clip, vae = host.embedded(case["variant"])
    return host.with_lora(model, case["lora"], 1.0) if "lora" in case else model, clip, vae


@pytest.mark.parametrize("name", CASES)
def test_both_hosts_restore_alike(comfy, node, given, headless, name):
    case = CASES[name]
    model, clip, vae = loaded(comfy, case)
    inputs, image = dict(case["inputs"]), given["image"]
    if "guided" in case:
        image = image[:, :64, :64]
        (model,) = node("RetortSpectralGuidance", model=model, vae=vae, reference=image[:1], **case["guided"])
    if inputs.pop("masked", False):
        inputs["mask"] = given["mask"]
    (got,) = node("RetortRestore", model=model, clip=clip, vae=vae, image=image, **inputs)
    assert got.shape == headless[name].shape
    assert float((got - headless[name]).abs().max()) <= 1 / 255
    assert float((got - torch.nn.functional.interpolate(
        image.movedim(-1, 1), got.shape[1:3], mode="bicubic").movedim(1, -1)).abs().max()) > 0.05  # fmt: skip


class OneColour:
    """A VAE that keeps means over blocks of 8 pixels as the first three of a model's channels."""

    def __init__(self, channels, video):
        self.channels, self.video = channels, video

    def encode(self, pixels):
        z = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        z = torch.cat([z, z.new_zeros(len(z), self.channels - 3, *z.shape[2:])], 1)
        return z.movedim(0, 1)[None] if self.video else z

    def decode(self, samples):
        samples = samples[0].movedim(1, 0) if self.video else samples
        return samples[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3).movedim(1, -1)


@pytest.mark.parametrize("kind", ["flow", "eps16", "eps", "v", "wan", "cog"])
def test_the_network_sees_the_clean_latent_and_the_timestep(comfy, node, tiny, recording, monkeypatch, kind):
    model, positive, _, latent = tiny(kind)
    channels, video = latent["samples"].shape[1], latent["samples"].ndim == 5
    vae = OneColour(channels, video)
    host = importlib.import_module(f"{comfy.package}.hosts.comfyui.host").host
    monkeypatch.setattr(host, "encode_text", lambda clip, text: positive)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(5 if video else 2, 64, 64, 3, generator=generator)
    given = {"clip": None, "vae": vae, "image": image, "scale": 1.0, "tile": 64, "overlap": 0, "batch_size": 8}
    with recording(model) as seen:
        (got,) = node("RetortRestore", model=model, **given)
    assert got.shape == image.shape and torch.isfinite(got).all()
    expected = model.model.process_latent_in(vae.encode(image))
    # A second call, if there is one, asks whether the model is a restorer.
    shown, told = seen.inputs[0], seen.timesteps[0]
    assert len(seen.inputs) <= 2
    # What the network is handed after core's own conversions.
    torch.testing.assert_close(shown.float(), expected, atol=1e-5, rtol=1e-5)
    assert float(told.flatten()[0]) == pytest.approx(400, abs=1e-3)


def test_instarevives_layout_has_another_latent_scale_in_core(comfy, node, recording, monkeypatch):
    """A PixArt-alpha 512 in diffusers' layout, which core takes for PixArt-sigma; latent_scale makes it right."""
    from diffusers import Transformer2DModel

    torch.manual_seed(0)
    network = Transformer2DModel(
        sample_size=64, num_layers=1, attention_head_dim=72, num_attention_heads=16, in_channels=4, out_channels=8,
        patch_size=2, attention_bias=True, cross_attention_dim=1152, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        caption_channels=4096,
    )  # fmt: skip
    model = comfy.sd.load_diffusion_model_state_dict(dict(network.state_dict()))
    assert model.model.latent_format.scale_factor == pytest.approx(0.13025)
    host = importlib.import_module(f"{comfy.package}.hosts.comfyui.host").host
    monkeypatch.setattr(host, "encode_text", lambda clip, text: [[torch.ones(1, 4, 4096), {}]])
    vae, image = OneColour(4, video=False), torch.rand(1, 512, 512, 3, generator=torch.Generator().manual_seed(0))
    given = {"clip": None, "vae": vae, "image": image, "scale": 1.0, "tile": 512, "overlap": 0}
    with recording(model) as seen:
        node("RetortRestore", model=model, latent_scale=0.18215, **given)
    torch.testing.assert_close(seen.inputs[0].float(), vae.encode(image) * 0.18215, atol=1e-5, rtol=1e-4)
    assert float(seen.timesteps[0].flatten()[0]) == 400


def test_options_of_the_model_are_honoured(comfy, node, tiny, given):
    """A post-CFG patch and a wrapper, both on a clone."""
    case = CASES["whole"]
    model, clip, vae = loaded(comfy, case)
    image = given["image"][:1, :64, :64]
    inputs = {"clip": clip, "vae": vae, "image": image, "scale": 1.0, "tile": 64, "overlap": 8, "colour_fix": "none"}
    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(lambda args: 0 * args["denoised"])
    (black,) = node("RetortRestore", model=patched, **inputs)
    with torch.inference_mode():
        nothing = vae.decode(model.model.process_latent_out(torch.zeros(1, 16, 8, 8)))
    torch.testing.assert_close(black, nothing.float().clamp(0, 1), atol=1e-4, rtol=0)
    assert not torch.allclose(node("RetortRestore", model=model, **inputs)[0], black, atol=0.05)


def test_a_captioner_leaves_memory(comfy, node, monkeypatch, tmp_path):
    management = importlib.import_module("comfy.model_management")
    captions = importlib.import_module(f"{comfy.package}.hosts.restoration.captions")
    rewards = importlib.import_module(f"{comfy.package}.hosts.comfyui.rewards")
    network = torch.nn.Linear(3, 3)
    held = rewards.Held(network)
    during = []

    def caption(images):
        held.load()
        during.append(any(one.model is held.patcher for one in management.current_loaded_models))
        return ["a red three"] * len(images)

    monkeypatch.setitem(captions.KINDS, "embedded", lambda host, **_: SimpleNamespace(holder=held, caption=caption))
    whole, tiles = node("RetortCaption", image=torch.rand(2, 64, 100, 3), captioner={"captioner": "embedded"},
                        per_tile=True, scale=1.0, tile=64, overlap=8)  # fmt: skip
    assert whole == "a red three\na red three" and len(tiles.splitlines()) == 4
    assert all(during) and not any(one.model is held.patcher for one in management.current_loaded_models)
    host = importlib.import_module(f"{comfy.package}.hosts.comfyui.host").host
    assert [path.name for path in host.captioners_folders()] == ["captioners"]
