"""The two samplers under the host's contract, on a model whose answers are known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from retort.sampling.distilled import Rule, sample_distilled
from retort.sampling.presets import PRESETS, PresetMismatch
from retort.sampling.reflection import ReflectionConfig, sample_reflection

from .conftest import Model, Processing, Rng

DISTILLED, REFLECTION = "Retort Distilled", "Retort Reflection"


def made(host, script, name: str, kind: str = "epsilon", **settings):
    """A sampler of the host's, and a way to make the generations that it is asked for."""
    sampler = host.sd_samplers.create_sampler(name, Model(kind))

    def processing(**of) -> Processing:
        p = Processing(**of)
        p.retort = script.Settings(**settings)
        return p

    return sampler, processing


def text_to_image(sampler, p: Processing, uncond: object = "negative"):
    return sampler.sample(p, p.rng.next(), "prompt", uncond)


def image_to_image(sampler, p: Processing, latent, steps=None, uncond: object = "negative"):
    return sampler.sample_img2img(p, latent, p.rng.next(), "prompt", uncond, steps=steps)


def latent_image(p: Processing):
    return 0.7 * torch.randn(len(p.seeds), *p.shape, generator=torch.Generator().manual_seed(7))


# ---- distilled ----


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("largest", [False, True])
def test_a_student_is_asked_at_its_timesteps_and_first_with_unit_noise(host, script, kind, largest) -> None:
    host.shared.opts.sgm_noise_multiplier = largest
    title = PRESETS["custom" if kind == "v_prediction" else "dmd2_sdxl_4step"].title
    sampler, processing = made(host, script, DISTILLED, kind, preset=title, timesteps="999, 749, 499, 249")
    out = text_to_image(sampler, processing())
    calls, predictor = sampler.model_wrap_cfg.calls, sampler.model_wrap.predictor
    assert [int(predictor.timestep(call.sigma[0])) for call in calls] == [999, 749, 499, 249]
    assert sampler.steps_told == [0, 1, 2, 3]
    noises = Rng([1], (4, 6, 5))
    first = noises.next()
    assert torch.allclose(calls[0].x / torch.sqrt(1 + calls[0].sigma ** 2), first, atol=1e-6)
    x = calls[0].x
    for now, after in zip(calls, [*calls[1:], None], strict=True):
        assert torch.allclose(now.x, x, atol=1e-5)
        x0 = Model(kind).guided(x, now.sigma, 1.0)
        x = x0 if after is None else x0 + after.sigma * noises.next()
    assert torch.allclose(out, x, atol=1e-5)


def test_one_call_at_399_returns_the_models_answer(host, script) -> None:
    sampler, processing = made(host, script, DISTILLED, preset=PRESETS["dmd2_sdxl_1step"].title)
    out = text_to_image(sampler, processing(steps=1))
    (call,) = sampler.model_wrap_cfg.calls
    assert int(sampler.model_wrap.predictor.timestep(call.sigma[0])) == 399
    assert torch.equal(out, Model().guided(call.x, call.sigma, 1.0))


def test_a_batch_gives_what_single_images_give(host, script) -> None:
    sampler, processing = made(host, script, DISTILLED)
    together = text_to_image(sampler, processing(seeds=(1, 2)))
    single = [text_to_image(made(host, script, DISTILLED)[0], processing(seeds=(seed,))) for seed in (1, 2)]
    assert torch.allclose(together, torch.cat(single), atol=1e-6)


def test_a_flow_student_starts_from_the_noise_itself(host, script) -> None:
    settings = {"preset": PRESETS["custom"].title, "timesteps": "1000 750 500", "mode": "deterministic"}
    sampler, processing = made(host, script, DISTILLED, "const", **settings)
    out = text_to_image(sampler, processing(steps=3, shape=(16, 6, 5)))
    calls = sampler.model_wrap_cfg.calls
    assert [round(float(call.sigma[0]), 6) for call in calls] == [1.0, 0.75, 0.5]
    assert torch.equal(calls[0].x, Rng([1], (16, 6, 5)).next())
    path = sampler.model_wrap.predictor.path
    alone = sample_distilled(
        lambda x, sigma: Model("const").guided(x, sigma, 1.0),
        calls[0].x,
        torch.tensor([1.0, 0.75, 0.5, 0.0]),
        disable=True,
        path=path,
        rule=Rule("deterministic"),
    )
    assert torch.allclose(out, alone, atol=1e-6)


@pytest.mark.parametrize("mode", ["tcd", "ancestral"])
@pytest.mark.parametrize("kind", ["epsilon", "const"])
def test_modes_that_renew_a_part_of_the_noise_take_the_hosts_schedule_and_noise(host, script, kind, mode) -> None:
    settings = {"preset": PRESETS["custom"].title, "timesteps": "999, 749, 499, 249", "mode": mode}
    sampler, processing = made(host, script, DISTILLED, kind, **settings)
    out = text_to_image(sampler, processing(shape=(4, 6, 5)))
    calls, predictor, rng = sampler.model_wrap_cfg.calls, sampler.model_wrap.predictor, Rng([1], (4, 6, 5))
    rng.next()
    levels = torch.cat([*(call.sigma[:1] for call in calls), torch.zeros(1)])
    alone = sample_distilled(
        lambda x, sigma: Model(kind).guided(x, sigma, 1.0), calls[0].x, levels, disable=True, path=predictor.path,
        rule=Rule(mode), schedule=predictor, noise_sampler=lambda *_: rng.next(),
    )  # fmt: skip
    assert len(calls) == 4 and torch.allclose(out, alone, atol=1e-5)


def test_a_student_whose_network_is_told_another_timestep_is_not_offered(script) -> None:
    told = [p.title for p in PRESETS.values() if p.label_scale != 1 or p.frames_per_block is not None]
    assert told and not set(told) & set(script.OFFERED)


@pytest.mark.parametrize("kind", ["epsilon", "const"])
@pytest.mark.parametrize("extra", [0.0, 0.3])
def test_image_to_image_begins_with_the_hosts_noised_latent(host, script, kind, extra) -> None:
    host.shared.opts.img2img_extra_noise = extra
    settings = {"preset": PRESETS["custom"].title, "timesteps": "999, 749, 499, 249"}
    sampler, processing = made(host, script, DISTILLED, kind, **settings)
    p = processing()
    latent, noise = latent_image(p), Rng([1], p.shape).next()
    image_to_image(sampler, p, latent)
    calls, predictor = sampler.model_wrap_cfg.calls, sampler.model_wrap.predictor
    # Half of four steps, and the one that the host always adds.
    assert len(calls) == 3
    sigma = calls[0].sigma[0]
    assert torch.allclose(calls[0].x, predictor.noise_scaling(sigma, noise, latent) + extra * noise, atol=1e-6)


def test_at_full_strength_image_to_image_is_text_to_image(host, script) -> None:
    sampler, processing = made(host, script, DISTILLED)
    p = processing(denoising_strength=1.0)
    out = image_to_image(sampler, p, latent_image(p))
    assert torch.equal(out, text_to_image(made(host, script, DISTILLED)[0], processing()))


def test_hires_takes_the_end_of_a_grid_that_the_student_has(host, script) -> None:
    sampler, processing = made(host, script, DISTILLED)
    p = processing(is_hr_pass=True)
    image_to_image(sampler, p, latent_image(p), steps=2)
    found = [int(sampler.model_wrap.predictor.timestep(call.sigma[0])) for call in sampler.model_wrap_cfg.calls]
    assert found == [499, 249]


@pytest.mark.parametrize(
    ("kind", "settings", "of", "told"),
    [
        ("epsilon", {}, {"steps": 20}, "20 steps are asked for and 'DMD2, SDXL, 4 steps' has 4"),
        ("const", {}, {}, "is for an eps model"),
        ("epsilon", {}, {"shape": (16, 6, 5)}, "has latents of 4 channels"),
        ("epsilon", {"preset": "DMD3"}, {}, "preset 'DMD3' is not known"),
        ("epsilon", {"preset": "Custom timesteps", "timesteps": "1, 2"}, {}, "each must be lower"),
    ],
)
def test_what_cannot_be_sampled_is_told_before_any_call(host, script, kind, settings, of, told) -> None:
    sampler, processing = made(host, script, DISTILLED, kind, **settings)
    with pytest.raises(PresetMismatch, match=told):
        text_to_image(sampler, processing(**of))
    assert not sampler.model_wrap_cfg.calls


def test_a_model_of_another_kind_is_refused_by_name(host, script) -> None:
    for name in (DISTILLED, REFLECTION):
        sampler, processing = made(host, script, name)
        sampler.model_wrap.predictor.prediction_type = "edm"
        with pytest.raises(ValueError, match="predicts 'edm'"):
            text_to_image(sampler, processing())


def test_a_cfg_that_burns_is_warned_of(host, script, caplog) -> None:
    sampler, processing = made(host, script, DISTILLED)
    text_to_image(sampler, processing(cfg_scale=2.0))
    assert not caplog.records
    text_to_image(sampler, processing(cfg_scale=7.0))
    assert "CFG Scale is 7" in caplog.text


def test_the_infotext_says_what_was_asked(host, script) -> None:
    sampler, processing = made(host, script, DISTILLED)
    text_to_image(sampler, p := processing())
    assert p.extra_generation_params == {"Retort preset": "DMD2, SDXL, 4 steps"}
    settings = {"preset": "Custom timesteps", "timesteps": "999, 499", "mode": "deterministic", "start": "noised"}
    sampler, processing = made(host, script, DISTILLED, **settings)
    text_to_image(sampler, p := processing(steps=2))
    assert p.extra_generation_params == {f"Retort {name}": value for name, value in settings.items()}
    sampler, processing = made(host, script, REFLECTION, weak_cfg=2.0)
    text_to_image(sampler, p := processing(cfg_scale=5.0))
    assert p.extra_generation_params["Retort weak CFG"] == 2.0
    assert "Retort preset" not in p.extra_generation_params


# ---- reflection ----


def plain(host, script, kind: str, **of):
    sampler = host.sd_samplers.create_sampler("Euler", Model(kind))
    return text_to_image(sampler, Processing(**of))


@pytest.mark.parametrize("kind", ["epsilon", "const"])
def test_reflecting_nothing_is_the_hosts_euler(host, script, kind) -> None:
    sampler, processing = made(host, script, REFLECTION, kind, end=0.0)
    out = text_to_image(sampler, processing(steps=8, cfg_scale=4.0))
    assert torch.allclose(out, plain(host, script, kind, steps=8, cfg_scale=4.0), atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "const"])
def test_a_weak_scale_equal_to_the_strong_one_changes_nothing(host, script, kind) -> None:
    settings = {"weak_cfg": 4.0, "inversion": "fixed_point", "iterations": 16}
    sampler, processing = made(host, script, REFLECTION, kind, **settings)
    out = text_to_image(sampler, processing(steps=12, cfg_scale=4.0))
    assert torch.allclose(out, plain(host, script, kind, steps=12, cfg_scale=4.0), atol=2e-3)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "const"])
@pytest.mark.parametrize("base", ["euler", "heun", "dpmpp_2m"])
def test_it_is_the_reflection_of_the_two_scales(host, script, kind, base) -> None:
    settings = {"weak_cfg": 1.5, "end": 0.75, "rounds": 2, "inversion": "midpoint", "base": base}
    sampler, processing = made(host, script, REFLECTION, kind, **settings)
    out = text_to_image(sampler, processing(steps=8, cfg_scale=4.0))
    model, predictor = Model(kind), sampler.model_wrap.predictor
    sigmas = sampler.get_sigmas(None, 8)
    x = predictor.noise_scaling(sigmas[0], Rng([1], (4, 6, 5)).next(), torch.zeros(1, 4, 6, 5))
    alone = sample_reflection(
        lambda x, sigma: model.guided(x, sigma, 4.0),
        x,
        sigmas,
        disable=True,
        path=predictor.path,
        weak=lambda x, sigma: model.guided(x, sigma, 1.5),
        config=ReflectionConfig(end=0.75, rounds=2, inversion="midpoint", base=base),
    )
    assert torch.equal(out, alone)


def test_a_leg_is_no_step_to_the_host(host, script) -> None:
    sampler, processing = made(host, script, REFLECTION)
    text_to_image(sampler, processing(steps=4, cfg_scale=4.0))
    calls = sampler.model_wrap_cfg.calls
    # Down, up and the step itself, three times, and a last step to zero.
    assert [call.step for call in calls] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert [call.cfg for call in calls] == [4.0, 1.0, 4.0] * 3 + [4.0]
    assert sampler.steps_told == [0, 1, 2, 3]


def test_in_the_hires_pass_its_own_scale_is_the_strong_one_and_stays(host, script) -> None:
    sampler, processing = made(host, script, REFLECTION)
    p = processing(steps=8, cfg_scale=9.0, is_hr_pass=True, hr_cfg=4.0)
    image_to_image(sampler, p, latent_image(p), steps=4)
    assert {call.cfg for call in sampler.model_wrap_cfg.calls} == {4.0, 1.0}
    assert p.hr_cfg == 4.0
    model = sampler.model_wrap.inner_model

    def fails(x, sigma, cfg):
        if cfg == 1.0:
            raise RuntimeError("out of memory")
        return Model().guided(x, sigma, cfg)

    model.guided = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        image_to_image(sampler, p, latent_image(p), steps=4)
    assert p.hr_cfg == 4.0


def test_interrupted_it_ends_as_the_hosts_own_do(host, script) -> None:
    sampler, processing = made(host, script, REFLECTION)
    guided = sampler.model_wrap.inner_model.guided

    def then_interrupted(x, sigma, cfg):
        host.shared.state.interrupted = True
        return guided(x, sigma, cfg)

    sampler.model_wrap.inner_model.guided = then_interrupted
    out = text_to_image(sampler, processing(cfg_scale=4.0))
    assert len(sampler.model_wrap_cfg.calls) == 1
    assert torch.equal(out, sampler.last_latent)


@pytest.mark.parametrize(
    ("of", "uncond", "told"),
    [
        ({}, None, "raise CFG Scale above 1"),
        ({"cfg_scale": 4.0, "refiner_checkpoint_info": SimpleNamespace()}, "negative", "refiner off"),
        ({"cfg_scale": 4.0, "steps": 1}, "negative", "hold none of the 0 steps"),
    ],
)
def test_what_cannot_be_reflected_is_told(host, script, of, uncond, told) -> None:
    sampler, processing = made(host, script, REFLECTION, weak_cfg=0.5)
    with pytest.raises(ValueError, match=told):
        text_to_image(sampler, processing(**of), uncond)
    assert not sampler.model_wrap_cfg.calls
