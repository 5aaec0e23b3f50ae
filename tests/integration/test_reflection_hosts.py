"""Reflection on the embedded model in both hosts, and its nodes through a ComfyUI server."""

from __future__ import annotations

import importlib
from functools import cache

import pytest
import torch

pytestmark = pytest.mark.integration
STEPS = 5
PROMPT = "a bold blue seven on yellow paper"


@pytest.fixture(scope="module")
def maths(ours):
    return ours("sampling.reflection")


@pytest.fixture(scope="module")
def reflected(ours):
    return ours("hosts.methods").Reflected


def simple(comfy, model, steps=STEPS):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)


@pytest.fixture(scope="module")
def parts(embedded):
    """parts(variant, headless) -> host, model, CONDITIONINGs by text, vae: the embedded model with its weights."""

    @cache
    def make(variant="flow", headless=False):
        host, model, clip, vae = embedded(variant, headless)
        with torch.inference_mode():
            words = {text: host.encode_text(clip, text) for text in (PROMPT, "a blue seven", "")}
        return host, model, words, vae

    return make


LORA = "digits_flow_bold.safetensors"


def pairs(host, kind, variant, parts, headless):
    """(strong, weak, reflecting or None) guiders of one kind on either host."""
    _, model, words, _ = parts(variant, headless)
    if kind == "cfg":
        guiders = [(model, PROMPT, 4.0), (model, PROMPT, 0.0)]
    elif kind == "lora":
        styled, other = (host.with_lora(model, LORA, strength) for strength in (0.8, -1.5))
        guiders = [(styled, PROMPT, 4.0), (other, PROMPT, 1.0), (styled, PROMPT, 1.0)]
    elif kind == "prompt":
        guiders = [(model, PROMPT, 4.0), (model, "a blue seven", 1.0), (model, PROMPT, 1.0)]
    else:
        early = parts(f"{variant} early", headless)[1]
        guiders = [(model, PROMPT, 4.0), (early, PROMPT, 1.0), (model, PROMPT, 1.0)]
    made = [host.cfg_guider(m, words[text], words[""], cfg) for m, text, cfg in guiders]
    return (*made, None)[:3]


@pytest.mark.parametrize(
    ("variant", "kind"),
    [("flow", "lora"), *((v, k) for v in ("flow", "eps") for k in ("cfg", "prompt", "model"))],
)
@pytest.mark.parametrize("how", [{}, {"inversion": "fixed_point", "base": "dpmpp_2m", "end": 0.6}], ids=["paper", "2m"])
def test_hosts_agree(comfy, ours, maths, reflected, parts, variant, kind, how):
    # The style LoRA is of the flow twin.
    latent = {"samples": torch.zeros(2, 16, 8, 8)}
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:] = 1
    found, spent = [], []
    sigmas = simple(comfy, parts(variant)[1], 8)
    for headless in (False, True):
        host = parts(variant, headless)[0]
        strong, weak, down = pairs(host, kind, variant, parts, headless)
        sampler = host.method_sampler(reflected(weak, maths.ReflectionConfig(**how), down))
        spent.append(ours("hosts.reflection").spent(host, strong, host.method_of(sampler), sigmas))
        with torch.inference_mode():
            plain = host.sample(strong, sampler, sigmas, latent, 3)
            image = {"samples": plain, "noise_mask": mask}
            found.append((plain, host.sample(strong, sampler, sigmas[3:], image, 4)))
    for here, there in zip(*found, strict=True):
        assert here.shape == (2, 16, 8, 8) and float((here - there).abs().max()) < 1e-4
    assert spent[0] == spent[1]


def test_a_lora_pair_of_one_model_reads_its_file_once(comfy, parts, maths, reflected, caplog):
    host, _, _, _ = parts()
    strong, weak, down = pairs(host, "lora", "flow", parts, False)
    sampler = host.method_sampler(reflected(weak, maths.ReflectionConfig(), down))
    sigmas, latent = simple(comfy, parts()[1]), {"samples": torch.zeros(1, 16, 8, 8)}
    with torch.inference_mode(), caplog.at_level("INFO", logger="retort"):
        a, b = (host.sample(strong, sampler, sigmas, latent, 3) for _ in range(2))
    assert torch.equal(a, b) and caplog.text.count("read again from its file") == 1
    assert not strong.model_patcher.is_clone(next(iter(sampler._copies.values())))


def test_a_lora_that_hangs_on_the_prompt_makes_the_same_pair(comfy, parts, maths, reflected):
    """Hooks write a leg's weights when it is asked: each leg has a network, and originals, of its own."""
    host, model, words, _ = parts()
    hooks = importlib.import_module("comfy.hooks")

    def hooked(strength):
        group = hooks.create_hook_lora(host.read_lora(LORA), strength, 0.0)
        return [hooks.set_hooks_for_conditioning(words[text], group) for text in (PROMPT, "")]

    strong, weak = (host.cfg_guider(model, *hooked(strength), 3.0) for strength in (0.8, -1.5))
    plain_strong, plain_weak = (
        host.cfg_guider(host.with_lora(model, LORA, s), words[PROMPT], words[""], 3.0) for s in (0.8, -1.5)
    )
    sigmas, latent = simple(comfy, model), {"samples": torch.zeros(1, 16, 8, 8)}
    euler, config = comfy.samplers.sampler_object("euler"), maths.ReflectionConfig()
    with torch.inference_mode():
        before = host.sample(strong, euler, sigmas, latent, 3)
        bare = host.sample(host.cfg_guider(model, words[PROMPT], words[""], 3.0), euler, sigmas, latent, 3)
        sampler = host.method_sampler(reflected(weak, config))
        found, again = (host.sample(strong, sampler, sigmas, latent, 3) for _ in range(2))
        plain = host.method_sampler(reflected(plain_weak, config))
        expected = host.sample(plain_strong, plain, sigmas, latent, 3)
        after = host.sample(strong, euler, sigmas, latent, 3)
        bare_after = host.sample(host.cfg_guider(model, words[PROMPT], words[""], 3.0), euler, sigmas, latent, 3)
    assert torch.equal(before, after) and torch.equal(found, again) and torch.equal(bare, bare_after)
    assert float((before - bare).abs().max()) > 1e-2
    assert float((found - expected).abs().max()) < 1e-4


def test_a_server_runs_the_nodes(server, ours):
    def step(name, /, **inputs):
        return {"class_type": name, "inputs": inputs}

    how = {"end": 1.0, "begin": 0.0, "rounds": 1, "inversion": "euler", "iterations": 3, "base": "euler"}
    done = server.run(
        {
            "m": step("RetortEmbeddedModel", variant="flow"),
            "p": step("CLIPTextEncode", clip=["m", 1], text=PROMPT),
            "n": step("CLIPTextEncode", clip=["m", 1], text=""),
            "s": step("BasicScheduler", model=["m", 0], scheduler="simple", steps=4, denoise=1.0),
            "l": step("EmptySD3LatentImage", width=64, height=64, batch_size=2),
            "r": step(
                "RetortReflectionSetup", model=["m", 0], positive=["p", 0], negative=["n", 0], pair="cfg", cfg=4.0,
                sigmas=["s", 0], **{"pair.weak_cfg": 0.0}, **how,
            ),
            "t": step("PreviewAny", source=["r", 2]),
            "c": step(
                "RetortReflectionCompare", guider=["r", 0], sampler=["r", 1], sigmas=["s", 0], latent=["l", 0],
                vae=["m", 2], seed=1,
            ),
            "x": step(
                "RetortReflectionSetup", model=["m", 0], positive=["p", 0], negative=["n", 0], pair="prompt", cfg=4.0,
                **{"pair.weak_positive": ["n", 0], "pair.reflecting_cfg": 1.0}, **how,
            ),
            "w": step("RetortReflectionSampler", weak=["x", 0], reflecting=["r", 0], **how),
            "z": step("RandomNoise", noise_seed=3),
            "a": step(
                "SamplerCustomAdvanced", noise=["z", 0], guider=["r", 0], sampler=["w", 0], sigmas=["s", 0],
                latent_image=["l", 0],
            ),
            "d": step("VAEDecode", samples=["a", 0], vae=["m", 2]),
            "o": step("SaveImage", images=["d", 0], filename_prefix="reflected"),
        }
    )  # fmt: skip
    assert done["status"]["status_str"] == "success", done["status"]
    assert len(done["outputs"]["c"]["images"]) == 2 and len(done["outputs"]["o"]["images"]) == 2
    text = "".join(done["outputs"]["t"]["text"])
    assert "4 steps, 3 reflections" in text and "cfg 8" in text and "17 network calls against 8 plain" in text
