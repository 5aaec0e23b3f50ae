"""Schedules, grids and samplers against the real ComfyUI, on analytic models and with core's own noise."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.integration

VE_SETTINGS = [
    {},
    {"zsnr": True},
    {"beta_schedule": "sqrt_linear", "linear_start": 0.0001, "linear_end": 0.02},
]
FLOW_SETTINGS = [{"shift": 1.0}, {"shift": 3.0}, {"shift": 6.0, "multiplier": 1.0}, {"noise_scale": 8.0}]
FLUX_SETTINGS = [{"shift": 1.15}, {"shift": 0.5}]
CASES = (
    [("discrete", s) for s in VE_SETTINGS] + [("flow", s) for s in FLOW_SETTINGS] + [("flux", s) for s in FLUX_SETTINGS]
)
IMAGE, VIDEO = (2, 4, 8, 8), (2, 4, 3, 8, 8)


@pytest.fixture(scope="module")
def pair(comfy, ours):
    """pair(kind, settings) -> (core's model_sampling, our schedule, our path)."""
    core, schedule, path = comfy.model_sampling, ours("sampling.schedule"), ours("sampling.path")
    kinds = {
        "discrete": (core.ModelSamplingDiscrete, core.EPS, schedule.DiscreteSchedule),
        "flow": (core.ModelSamplingDiscreteFlow, core.CONST, schedule.FlowSchedule),
        "flux": (core.ModelSamplingFlux, core.CONST, schedule.FluxSchedule),
    }

    def make(kind, settings):
        table, parametrisation, mine = kinds[kind]
        theirs = type("Both", (table, parametrisation), {})(SimpleNamespace(sampling_settings=settings))
        where = path.VE if kind == "discrete" else path.NoisePath("FLOW", settings.get("noise_scale", 1.0))
        return theirs, mine(**settings), where

    return make


class Wrapped:
    """A Gaussian's posterior mean under the attributes through which core's samplers ask for model_sampling."""

    def __init__(self, model_sampling, flow):
        self.flow, self.inner_model = flow, self
        self.model_sampling = model_sampling
        self.model_patcher = SimpleNamespace(get_model_object=lambda name: model_sampling)

    def __call__(self, x, sigma, **extra_args):
        s = sigma.view(-1, *(1,) * (x.ndim - 1))
        a = 1 - s if self.flow else torch.ones_like(s)
        return 0.4 + a * 0.49 / (a**2 * 0.49 + s**2) * (x - a * 0.4)


def draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_schedules_hold_core_s_numbers(pair, kind, settings):
    theirs, mine, _ = pair(kind, settings)
    assert torch.equal(mine.sigmas, theirs.sigmas)
    assert torch.equal(mine.timestep(mine.sigmas), theirs.timestep(theirs.sigmas))
    between = (mine.sigmas[1:] * mine.sigmas[:-1]).sqrt()
    assert torch.equal(mine.timestep(between), theirs.timestep(between))
    unit = {"discrete": 999.0, "flow": settings.get("multiplier", 1000), "flux": 1.0}[kind]
    t = torch.linspace(0.001, 1, 77) * unit
    assert torch.equal(mine.sigma(t), theirs.sigma(t))
    for percent in (-0.1, 0.0, 0.2, 0.77, 1.0):
        assert mine.percent_to_sigma(percent) == theirs.percent_to_sigma(percent)


@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_grids_are_core_s(comfy, ours, pair, kind, settings):
    theirs, mine, _ = pair(kind, settings)
    for name, grid in ours("sampling.grids").GRIDS.items():
        for steps in (*range(1, 13), 20, 31, 50, 100):
            expected = comfy.samplers.calculate_sigmas(theirs, name, steps)
            assert torch.equal(grid(mine, steps), expected), (name, steps)
            # Our grids read core's object as well: nodes hand it over.
            assert torch.equal(grid(theirs, steps), expected), (name, steps)


@pytest.mark.parametrize("shape", [IMAGE, VIDEO], ids=["image", "video"])
@pytest.mark.parametrize("grid", ["simple", "karras", "beta"])
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "euler_ancestral", "lcm"])
@pytest.mark.parametrize(("kind", "settings"), [CASES[0], CASES[1], CASES[4], CASES[6], CASES[7]])
def test_standard_samplers_are_core_s_bit_for_bit(comfy, ours, pair, kind, settings, name, grid, shape):
    theirs, mine, path = pair(kind, settings)
    model = Wrapped(theirs, kind != "discrete")
    sigmas = ours("sampling.grids").GRIDS[grid](mine, 9)
    x = theirs.noise_scaling(sigmas[0], draw(shape, 1), torch.zeros(shape), True)
    core = import_module("comfy.k_diffusion.sampling")
    for end in (len(sigmas), 6):  # to zero, and a grid that stops early
        part = sigmas[:end]
        expected = getattr(core, f"sample_{name}")(model, x, part, {"seed": 7}, disable=True)
        got = ours("sampling.standard").SAMPLERS[name](model, x, part, {"seed": 7}, disable=True, path=path)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("eta", [0.0, 0.4])
@pytest.mark.parametrize(("kind", "settings"), [CASES[0], CASES[4]])
def test_ancestral_eta_is_core_s(ours, pair, kind, settings, eta):
    theirs, mine, path = pair(kind, settings)
    model = Wrapped(theirs, kind != "discrete")
    sigmas = ours("sampling.grids").simple(mine, 9)
    x = draw(IMAGE, 1) * sigmas[0]
    core = import_module("comfy.k_diffusion.sampling").sample_euler_ancestral
    expected = core(model, x, sigmas, {"seed": 7}, disable=True, eta=eta, s_noise=1.1)
    got = ours("sampling.standard").sample_euler_ancestral(
        model, x, sigmas, {"seed": 7}, disable=True, path=path, eta=eta, s_noise=1.1
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("latent", ["empty", "image"])
def test_dmd2_four_steps_are_core_s_lcm_on_simple(comfy, ours, pair, latent):
    """Start, grid and steps, as KSAMPLER runs them at full denoise; with a latent image core adds it to the noise."""
    theirs, mine, path = pair("discrete", {})
    presets, distilled = ours("sampling.presets"), ours("sampling.distilled")
    preset = presets.PRESETS["dmd2_sdxl_4step"]
    sigmas = presets.sigmas(preset, 4, theirs, path)
    assert torch.equal(sigmas, comfy.samplers.calculate_sigmas(theirs, "simple", 4))
    z = torch.zeros(IMAGE) if latent == "empty" else draw(IMAGE, 2)
    model, n = Wrapped(theirs, False), draw(IMAGE, 1)

    x = theirs.noise_scaling(sigmas[0], n.clone(), z, True)
    expected = import_module("comfy.k_diffusion.sampling").sample_lcm(model, x, sigmas, {"seed": 7}, disable=True)
    x = distilled.start(path, sigmas[0], n, z, preset.start, True, float(sigmas[0]))
    got = distilled.sample_distilled(model, x, sigmas, {"seed": 7}, disable=True, path=path, rule=preset.rule)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("mode", ["renoise", "deterministic"])
@pytest.mark.parametrize(("kind", "settings"), [CASES[0], CASES[4], CASES[6], CASES[7]])
def test_image_to_image_starts_and_steps_as_core(ours, pair, kind, settings, mode):
    theirs, mine, path = pair(kind, settings)
    distilled = ours("sampling.distilled")
    sigmas = ours("sampling.grids").simple(mine, 6)[2:]
    n, z = draw(IMAGE, 1), draw(IMAGE, 2)
    x = theirs.noise_scaling(sigmas[0], n.clone(), z, False)
    assert torch.equal(distilled.start(path, sigmas[0], n, z, "unit", False, float(mine.sigma_max)), x)
    assert torch.equal(distilled.start(path, sigmas[0], n, z, "noised"), x)

    core = import_module("comfy.k_diffusion.sampling")
    model = Wrapped(theirs, kind != "discrete")
    sampler = core.sample_lcm if mode == "renoise" else core.sample_euler
    expected = sampler(model, x, sigmas, {"seed": 7}, disable=True)
    got = distilled.sample_distilled(model, x, sigmas, {"seed": 7}, disable=True, path=path, rule=distilled.Rule(mode))
    if mode == "renoise":
        assert torch.equal(got, expected)
    else:  # core's last step to zero is x - (x - x0), ours x0
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("kind", "settings"), [CASES[0], CASES[4], CASES[6], CASES[7]])
@pytest.mark.parametrize("shape", [IMAGE, VIDEO], ids=["image", "video"])
def test_ancestral_is_core_s_to_the_bit_with_its_own_draws(ours, pair, kind, settings, eta, shape):
    theirs, mine, path = pair(kind, settings)
    distilled = ours("sampling.distilled")
    sigmas = ours("sampling.grids").simple(mine, 4)
    model, x = Wrapped(theirs, kind != "discrete"), draw(shape, 1)
    core = import_module("comfy.k_diffusion.sampling")
    expected = core.sample_euler_ancestral(model, x, sigmas, {"seed": 7}, disable=True, eta=eta)
    got = distilled.sample_distilled(
        model, x, sigmas, {"seed": 7}, disable=True, path=path, rule=distilled.Rule("ancestral", eta)
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_noise_of_another_scale_that_is_cut_is_core_s_lcm_to_the_bit(ours, pair, scale):
    """As HiDream-O1 takes it: core's node sets the scale on the model, and its LCM cuts at 2.5 deviations."""
    theirs, mine, path = pair("flow", {"shift": 3.0, "noise_scale": scale})
    distilled = ours("sampling.distilled")
    rule = distilled.Rule(noise_scale=scale, clip=2.5)
    sigmas, n = ours("sampling.grids").simple(mine, 6), draw(IMAGE, 1)
    model, core = Wrapped(theirs, True), import_module("comfy.k_diffusion.sampling")
    x = theirs.noise_scaling(sigmas[0], n.clone(), torch.zeros(IMAGE), True)
    expected = core.sample_lcm(model, x, sigmas, {"seed": 7}, disable=True, noise_clip_std=2.5)
    found = rule.noised(ours("sampling.path").FLOW)
    assert found == path
    x = distilled.start(found, sigmas[0], n, None)
    got = distilled.sample_distilled(model, x, sigmas, {"seed": 7}, disable=True, path=found, rule=rule)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", ["discrete", "flow"])
def test_presets_read_core_s_schedules(ours, pair, kind):
    presets = ours("sampling.presets")
    theirs, mine, path = pair(kind, {"shift": 3.0} if kind == "flow" else {})
    for preset in presets.PRESETS.values():
        if preset.family == {"discrete": "eps", "flow": "flow"}[kind]:
            for steps in preset.step_counts:
                sigmas = presets.sigmas(preset, steps, theirs, path)
                assert torch.equal(sigmas, presets.sigmas(preset, steps, mine, path))
                told = theirs.timestep(sigmas[:-1])
                if preset.timesteps:
                    assert tuple(told.tolist()) == presets.timesteps(preset, steps)
                else:
                    torch.testing.assert_close(told / 1000, presets.levels(preset, steps), rtol=0, atol=1e-6)


def test_lcm_s_spaced_table(ours):
    """ComfyUI's sampling for LCM keeps 50 levels; its own timesteps are still met, DMD2's are refused by name."""
    presets = ours("sampling.presets")
    spaced = import_module("comfy_extras.nodes_model_advanced").ModelSamplingDiscreteDistilled()
    sigmas = presets.sigmas(presets.PRESETS["lcm"], 4, spaced, ours("sampling.path").VE)
    assert spaced.timestep(sigmas[:-1]).tolist() == [999, 759, 499, 259]
    with pytest.raises(presets.PresetMismatch, match="needs timestep 749"):
        presets.sigmas(presets.PRESETS["dmd2_sdxl_4step"], 4, spaced, ours("sampling.path").VE)
