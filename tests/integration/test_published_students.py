"""Every preset of a published student on a tiny network of each real class that it is for, in real ComfyUI."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math

import pytest
import torch

from retort.benchmarks.family_networks import families
from retort.sampling import presets
from retort.sampling.presets import PRESETS

pytestmark = pytest.mark.integration
KINDS = {family.kind: name for name, family in reversed(families().items()) if not family.too_large}
# Of ComfyUI's releases after this one.
LATER = {
    "qwen_image_21_turbo", "qwen_image_21_lightning", "qwen_image_21_viggle", "qwen_image_21_pruna",
    "ming_image_design",
}  # fmt: skip
CASES = [(key, kind) for key, preset in PRESETS.items() for kind in preset.architectures]


@pytest.fixture(scope="module")
def family(comfy):
    """family(kind) -> its row, MODEL and a prompt; each network is made once."""

    @functools.lru_cache(maxsize=2)
    def make(kind):
        row = families()[KINDS[kind]]
        if kind == "SD20":
            row = dataclasses.replace(row, state="")  # core tells eps from v by a weight; SD Turbo is eps
        with torch.inference_mode():
            return row, row.model(), row.prompt(3)

    return make


@contextlib.contextmanager
def told_to(network):
    """The highest timestep of each call; networks of video with sound are given lists."""
    found: list[float] = []

    def saw(module, given):
        parts = given[1] if isinstance(given[1], list | tuple) else [given[1]]
        found.append(max(float(part.max()) for part in parts))

    handle = network.register_forward_pre_hook(saw)
    try:
        yield found
    finally:
        handle.remove()


def test_every_class_that_a_preset_names_is_one_of_comfyui_s(comfy):
    known = {kind.__name__ for kind in comfy.supported_models.models}
    assert {kind for _, kind in CASES} <= known
    unnamed = {key for key, preset in PRESETS.items() if not preset.architectures}
    assert {key for key in unnamed if not key.startswith("digits")} <= LATER | {"custom"}


@pytest.mark.parametrize(("key", "kind"), sorted(CASES, key=lambda case: case[1]))
def test_the_network_is_told_the_student_s_levels(comfy, family, key, kind):
    """In the units of its class, to 1e-6 (Mage-Flow's class itself rounds what it is told to bf16); whole timesteps
    exactly, and times the student's own factor."""
    preset, (row, model, positive) = PRESETS[key], family(kind)
    setup = comfy.plugin["RetortDistilledSetup"]
    more = {} if preset.cfg == 1 else {"negative": row.prompt(4)}
    latent = row.empty(row.noise(5)) if preset.start == "latent" else row.empty()
    for steps in preset.step_counts:
        patched, guider, sampler, sigmas, *_ = setup.execute(model, positive, key, steps, **more).args
        with torch.inference_mode(), told_to(patched.model.diffusion_model) as told:
            noise = comfy.custom.Noise_RandomNoise(7).generate_noise(latent)
            out = guider.sample(noise, latent["samples"], sampler, sigmas, seed=7)
        if preset.frames_per_block is not None:
            # Each block of frames, then the finished block once, which fills the caches.
            blocks = -(-latent["samples"].shape[2] // preset.frames_per_block)
            assert len(told) == blocks * (steps + 1) and told == (told[:steps] + [0.0]) * blocks
            told = told[:steps]
        assert len(told) == steps
        schedule = patched.get_model_object("model_sampling")
        unit = float(schedule.timestep(torch.tensor(1.0))) if preset.family == "flow" else 1000.0
        if preset.timesteps:
            expected = [math.floor(t * preset.label_scale) * unit / 1000 for t in presets.timesteps(preset, steps)]
        else:
            expected = [unit * level for level in presets.levels(preset, steps).tolist()]
        rounded = 2**-8 if kind == "MageFlow" else 1e-6
        assert told == pytest.approx(expected, rel=0, abs=rounded * unit)
        parts = out.unbind() if out.is_nested else [out]
        assert all(bool(torch.isfinite(part).all()) for part in parts)


@pytest.mark.parametrize(
    ("key", "steps", "scheduler", "kind"),
    [
        ("wan22_lightx2v_t2v", 4, "simple", "WAN21_T2V"),
        ("krea2_turbo", 8, "simple", "Krea2"),
        ("flux_schnell", 4, "simple", "FluxSchnell"),
        ("acestep15_turbo", 8, "simple", "ACEStep15"),
        ("mage_flow_turbo", 4, "simple", "MageFlow"),
        ("z_image_turbo", 8, "simple", "ZImage"),
        ("hunyuanvideo15_sr", 8, "simple", "HunyuanVideo15_SR_Distilled"),
        ("ltx2_distilled", 8, "linear_quadratic", "LTXAV"),
        ("lightning_sdxl", 8, "simple", "SDXL"),
        ("hyper_sd", 4, "simple", "SDXL"),
        ("flux2_klein", 4, "Flux2Scheduler", "Flux2"),
        ("qwen_image_lightning", 4, "simple", "QwenImage"),
        ("hidream_i1_fast", 16, "normal", "HiDream"),
        ("sd35_large_turbo", 4, "normal", "SD3"),
    ],
)
def test_where_core_has_the_levels_they_are_core_s(comfy, family, key, steps, scheduler, kind):
    """To the bit, but for the two whose levels core rounds at other places."""
    model, positive = family(kind)[1:]
    setup = comfy.plugin["RetortDistilledSetup"].execute(model, positive, key, steps).args
    patched, sigmas = setup[0], setup[3]
    if scheduler == "Flux2Scheduler":
        core = __import__("comfy_extras.nodes_flux", fromlist=["x"]).Flux2Scheduler.execute(steps, 1024, 1024).args[0]
    else:
        core = comfy.samplers.calculate_sigmas(patched.get_model_object("model_sampling"), scheduler, steps)
    if scheduler in ("normal", "linear_quadratic"):
        torch.testing.assert_close(sigmas, core, rtol=0, atol=2e-6)
    else:
        assert torch.equal(sigmas, core)


@pytest.mark.parametrize(
    ("key", "kind"), [("z_image_turbo", "ZImage"), ("krea2_turbo", "Krea2"), ("flux_schnell", "FluxSchnell")]
)
def test_where_a_template_is_right_its_latents_are_ours(comfy, family, key, kind):
    """Core's euler on the same levels, to the bit."""
    row, model, positive = family(kind)
    patched, guider, sampler, sigmas, *_ = comfy.plugin["RetortDistilledSetup"].execute(model, positive, key, 0).args
    empty = row.empty()["samples"].repeat(2, *(1,) * len(row.latent))
    with torch.inference_mode():
        noise = comfy.sample.prepare_noise(empty, 9)
        ours = guider.sample(noise, empty, sampler, sigmas, seed=9)
        core = guider.sample(noise, empty, comfy.samplers.sampler_object("euler"), sigmas, seed=9)
    assert torch.equal(ours, core)


def test_auto_knows_the_student_in_a_prompt_of_comfyui(comfy, family, ours):
    model, positive = family("ZImage")[1:]
    io = __import__("comfy_api.latest", fromlist=["io"]).io
    prompt = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "z_image_turbo_bf16.safetensors"}},
        "2": {"class_type": "RetortDistilledSetup", "inputs": {"model": ["1", 0]}},
    }
    hidden = {"hidden_inputs": {io.Hidden.prompt: prompt, io.Hidden.unique_id: "2"}}
    running = comfy.plugin["RetortDistilledSetup"].PREPARE_CLASS_CLONE(hidden)
    assert len(running.execute(model, positive, "auto", 0).args[3]) == 9
    recognise = ours("hosts.recognise")
    every = ours("sampling.presets").PRESETS.values()
    host = ours("hosts.comfyui.host").host
    found = recognise.of_model(host, every, ["z_image_turbo_bf16.safetensors"], model, lambda preset: None)
    assert found.title.endswith("(auto, by the name of z_image_turbo_bf16.safetensors and the model's kind, ZImage)")
