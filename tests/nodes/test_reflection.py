"""The reflection nodes on the headless host, with the embedded model and its style LoRA."""

from __future__ import annotations

import pytest
import torch

from retort.graphs.core.sampling import grid
from retort.hosts import api, reflection
from retort.hosts.headless.samplers import StandardSampler
from retort.nodes.reflection import (
    PAIRS,
    RetortReflectionCompare,
    RetortReflectionSampler,
    RetortReflectionSetup,
)
from retort.sampling.reflection import ReflectionConfig

STEPS, PROMPT = 6, "a bold blue seven on yellow paper"
LORA = "digits_flow_bold.safetensors"


@pytest.fixture(scope="module")
def parts():
    """model, words(text) -> CONDITIONING, vae of the flow twin."""
    model, clip, vae = api.host.embedded("flow")
    return model, clip.encode, vae


def empty(batch=1):
    return {"samples": torch.zeros(batch, 16, 8, 8)}


def kind(name, parts, **changes):
    given = {i.id: i.default for i in PAIRS[name]() if i.id not in ("lora", "weak_positive", "weak_model")}
    extra = {
        "lora": {"lora": LORA},
        "prompt": {"weak_positive": parts[1]("a blue seven")},
        "model": {"weak_model": api.host.embedded("flow early")[0]},
    }
    return {"pair": name, **given, **extra.get(name, {}), **changes}


def made(parts, name, pair=(), **given):
    model, words, _ = parts
    return RetortReflectionSetup.execute(model, words(PROMPT), words(""), kind(name, parts, **dict(pair)), **given).args


def run(guider, sampler, sigmas, latent=None, seed=3):
    return api.host.sample(guider, sampler, sigmas, latent or empty(), seed)


def apart(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", list(PAIRS))
def test_the_papers_defaults_of_each_kind(parts, name):
    strong, sampler, text = made(parts, name)
    sigmas = grid(parts[0], "simple", STEPS)
    assert strong.cfg == 5.5 and sampler.config == ReflectionConfig()
    if name == "cfg":
        assert sampler.weak.cfg == 0 and sampler.reflecting is None
        assert "cfg 11 " in text
    else:
        assert sampler.weak.cfg == sampler.reflecting.cfg == 1 and "cfg 11" not in text
        assert sampler.reflecting.model is strong.model
    if name == "lora":
        assert [g.model.loras[0].strength for g in (strong, sampler.weak)] == [0.8, -1.5] and not parts[0].loras
    assert "50 steps, 49 reflections: 148 model calls, 50 plain" in text and "connect sigmas" in text
    plain = run(strong, StandardSampler("euler"), sigmas)
    found = run(strong, sampler, sigmas)
    assert torch.isfinite(found).all() and apart(found, plain) > 0.05


@pytest.mark.parametrize("name", list(PAIRS))
def test_the_cost_is_that_of_the_network(parts, name, monkeypatch):
    strong, sampler, text = made(parts, name, sigmas=grid(parts[0], "simple", STEPS))
    calls = []
    networks = {id(g.model.network): g.model.network for g in (strong, sampler.weak)}
    for network in {type(n): n for n in networks.values()}.values():
        call = type(network).__call__
        monkeypatch.setattr(
            type(network),
            "__call__",
            lambda self, x, t, call=call, **c: (calls.append(len(x)), call(self, x, t, **c))[1],
        )
    run(strong, sampler, grid(parts[0], "simple", STEPS))
    # Guided steps, and two unguided legs; a cfg pair goes down guided.
    expected = 2 * STEPS + (STEPS - 1) * (3 if name == "cfg" else 2)
    assert sum(calls) == expected
    assert f"{expected} network calls against {2 * STEPS} plain" in text and "connect sigmas" not in text


def test_a_pair_without_a_gap_is_the_plain_sampler(parts):
    sigmas = grid(parts[0], "simple", STEPS)
    for name, pair in (("cfg", {"weak_cfg": 5.5}), ("lora", {"strong_strength": -0.5, "weak_strength": -0.5})):
        strong, sampler, _ = made(parts, name, pair, inversion="fixed_point", base="dpmpp_2m")
        assert apart(run(strong, sampler, sigmas), run(strong, StandardSampler("dpmpp_2m"), sigmas)) < 1e-3
    strong, sampler, _ = made(parts, "model", end=0.0)
    assert torch.equal(run(strong, sampler, sigmas), run(strong, StandardSampler("euler"), sigmas))


def test_setup_and_sampler_are_the_same_thing(parts):
    strong, sampler, _ = made(parts, "model", rounds=2, begin=0.2, end=0.7)
    own = RetortReflectionSampler.execute(
        sampler.weak, end=0.7, begin=0.2, rounds=2, reflecting=sampler.reflecting
    ).args[0]
    assert own.config == sampler.config == ReflectionConfig(0.2, 0.7, 2)
    sigmas = grid(parts[0], "simple", STEPS)
    assert torch.equal(run(strong, own, sigmas), run(strong, sampler, sigmas))


def test_equal_cfg_while_reflecting_needs_no_third_guider(parts):
    assert made(parts, "model", {"reflecting_cfg": 5.5})[1].reflecting is None


def test_compare_shows_the_four(parts):
    sigmas, latent = grid(parts[0], "simple", STEPS), empty(2)
    strong, sampler, _ = made(parts, "cfg", cfg=3.0, inversion="fixed_point", iterations=2)
    image, reflected, text = RetortReflectionCompare.execute(strong, sampler, sigmas, latent, parts[2], 3).args
    assert torch.equal(reflected["samples"], run(strong, sampler, sigmas, latent))
    reflections = STEPS - 1
    calls = 2 * STEPS + reflections * (2 + 2)
    equal = round(calls / 2)
    assert text.splitlines() == [
        f"plain, {STEPS} steps: {2 * STEPS} calls",
        f"cfg 6, {STEPS} steps: {2 * STEPS} calls",
        f"equal calls, {equal} steps: {2 * equal} calls",
        f"reflected: {calls} calls",
    ]
    assert len(image) == 2 and image.shape[2] > 4 * 192 and 0 <= float(image.min()) < float(image.max()) <= 1
    alone = run(strong, StandardSampler("euler"), sigmas, latent)
    decoded = api.host.decode(parts[2], alone)
    shown = image[:, 18 : 18 + 192, 6 : 6 + 192]
    assert apart(shown[:, ::3, ::3], decoded) < 1 / 200


def test_compare_leaves_out_what_is_not_defined(parts):
    sigmas = grid(parts[0], "simple", STEPS)
    strong, sampler, _ = made(parts, "prompt")
    text = RetortReflectionCompare.execute(strong, sampler, sigmas, empty(), parts[2], 3).args[2]
    assert [line.split(",")[0].split(":")[0] for line in text.splitlines()] == ["plain", "equal calls", "reflected"]
    with pytest.raises(ValueError, match="sampler is not from a reflection node"):
        RetortReflectionCompare.execute(strong, StandardSampler("euler"), sigmas, empty(), parts[2], 3)


def test_a_refined_schedule_keeps_its_ends_and_its_levels(parts):
    for sigmas in (grid(parts[0], "simple", 8), torch.tensor([14.0, 5.0, 1.0, 0.2])):
        ends = float(sigmas[-1]) == 0
        for steps in (8, 11, 16):
            fine = reflection.refined(sigmas, steps)
            assert len(fine) == steps + 1 and bool((fine[1:] < fine[:-1]).all())
            assert fine[0] == pytest.approx(float(sigmas[0])) and fine[-1] == pytest.approx(float(sigmas[-1]))
        own = sigmas[:-1] if ends else sigmas
        double = reflection.refined(sigmas, 2 * len(own) - 1 if ends else 2 * len(own) - 2)
        torch.testing.assert_close(double[: 2 * len(own) - 1 : 2], own)


def test_a_mask_holds(parts):
    sigmas = grid(parts[0], "simple", STEPS)
    strong, sampler, _ = made(parts, "cfg")
    picture = run(strong, StandardSampler("euler"), sigmas)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    out = run(strong, sampler, sigmas[1:], {"samples": picture, "noise_mask": mask})
    assert apart(out[..., :4], picture[..., :4]) < 1e-4 and apart(out[..., 4:], picture[..., 4:]) > 0.05


def test_what_cannot_be_is_said(parts):
    model, words, vae = parts
    sigmas = grid(model, "simple", STEPS)
    strong, sampler, _ = made(parts, "cfg")
    other = api.host.embedded("eps")[0]
    wrong = RetortReflectionSampler.execute(api.host.cfg_guider(other, words(PROMPT), None, 1.0)).args[0]
    with pytest.raises(ValueError, match=r"weak guider's model samples in other coordinates \(VE\).*\(FLOW"):
        run(strong, wrong, sigmas)
    bare = RetortReflectionSampler.execute(api.host.cfg_guider(model, [], None, 1.0)).args[0]
    with pytest.raises(ValueError, match=r"weak guider has no conditioning \(positive\)"):
        run(strong, bare, sigmas)
    with pytest.raises(ValueError, match="hold none of the 5 steps"):
        run(strong, RetortReflectionSampler.execute(sampler.weak, end=0.05, begin=0.01).args[0], sigmas)
    with pytest.raises(ValueError, match="begin 0.8 and end 0.5"):
        RetortReflectionSampler.execute(sampler.weak, end=0.5, begin=0.8)
    with pytest.raises(ValueError, match="draws fresh noise"):
        RetortReflectionSampler.execute(sampler.weak, base="euler_ancestral")
    broken = [[t * float("nan"), e] for t, e in words(PROMPT)]
    bad = RetortReflectionSampler.execute(api.host.cfg_guider(model, broken, None, 1.0)).args[0]
    with pytest.raises(ValueError, match="the weak model returned NaN"):
        run(strong, bad, sigmas)
    form = model.latent
    from dataclasses import replace

    alien = replace(model, latent=replace(form, scale=2 * form.scale))
    with pytest.raises(ValueError, match="latents of another format"):
        run(
            strong,
            RetortReflectionSampler.execute(api.host.cfg_guider(alien, words(PROMPT), None, 1.0)).args[0],
            sigmas,
        )
