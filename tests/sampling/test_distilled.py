"""Few-step sampling through a recording network: what enters it at each call, and what comes out in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from retort.sampling import presets
from retort.sampling.distilled import MODES, Rule, sample_distilled, start
from retort.sampling.grids import simple
from retort.sampling.path import FLOW, VE, VP, NoisePath
from retort.sampling.presets import PRESETS
from retort.sampling.schedule import DiscreteSchedule, FlowSchedule
from retort.sampling.standard import SAMPLERS, SamplingDiverged

SD = DiscreteSchedule()
COG = DiscreteSchedule(zsnr=True)
PIXART = DiscreteSchedule("sqrt_linear", 1e-4, 0.02)
PATHS = [VE, FLOW, VP, NoisePath("FLOW", 8.0)]
IMAGE, VIDEO = (2, 4, 5, 6), (2, 4, 3, 5, 6)

PLAIN = ("renoise", "deterministic", "single")  # steps that keep or renew all of the noise
USUAL = [preset for preset in PRESETS.values() if preset.mode in PLAIN and preset.rule == Rule(preset.mode)]
GRIDS_OF_PRESETS = [(p, n) for p in USUAL for n in p.step_counts]
PRESET_IDS = [f"{p.key}-{n}" for p, n in GRIDS_OF_PRESETS]


def setting(preset):
    """(path, prediction, schedule) of a model that the preset is for."""
    if preset.family == "flow":
        return FLOW, "flow", FlowSchedule(preset.shift or 1.0)
    if preset.family == "v":
        return VP, "v", COG
    return VE, "eps", PIXART if preset.key == "instarevive" else SD


def table(path):
    """A schedule of a model on this path."""
    return FlowSchedule() if path.kind == "FLOW" else COG if path is VP else SD


def run(model, preset, sigmas, path, noise, latent, fresh=None):
    x = start(path, sigmas[0], noise, latent, preset.start, start_sigma=float(sigmas[0]))
    sampler = iter(fresh).__next__ if fresh else None
    return sample_distilled(
        model, x, sigmas, {"seed": 7}, disable=True, path=path, rule=preset.rule,
        noise_sampler=(lambda *_: sampler()) if sampler else None,
    )  # fmt: skip


@pytest.mark.parametrize(("preset", "steps"), GRIDS_OF_PRESETS, ids=PRESET_IDS)
def test_the_network_gets_the_noise_the_integers_and_the_closed_form(preset, steps, network, noise):
    path, prediction, schedule = setting(preset)
    shape = VIDEO if preset.latent_dims == 3 else IMAGE
    n, z, fresh = noise(shape, 1), noise(shape, 2), [noise(shape, 10 + k) for k in range(steps)]
    model = network(path, prediction, schedule)
    sigmas = presets.sigmas(preset, steps, schedule, path)
    out = run(model, preset, sigmas, path, n, z, fresh)

    if preset.timesteps:
        assert model.timesteps == [[t, t] for t in presets.timesteps(preset, steps)]
    else:
        told = torch.tensor(model.timesteps) / 1000
        torch.testing.assert_close(told, presets.levels(preset, steps)[:, None].expand(-1, 2), rtol=0, atol=1e-6)
    first = z if preset.start == "latent" else n
    torch.testing.assert_close(model.inputs[0], first, rtol=1e-6, atol=1e-6)
    for k in range(1, steps):
        s, s_before = sigmas[k].double(), sigmas[k - 1].double()
        x0, before = model.x0[k - 1].double(), model.inputs[k - 1].double()
        a, b = (1 - s, s) if path is FLOW else (1 / (1 + s**2).sqrt(), s / (1 + s**2).sqrt())
        a_before, b_before = (
            (1 - s_before, s_before)
            if path is FLOW
            else (1 / (1 + s_before**2).sqrt(), s_before / (1 + s_before**2).sqrt())
        )
        mixed = fresh[k - 1].double() if preset.mode == "renoise" else (before - a_before * x0) / b_before
        torch.testing.assert_close(model.inputs[k].double(), a * x0 + b * mixed, rtol=1e-5, atol=1e-5)
    # The last x0; what is deterministic ends in core's operations, which round it once more.
    assert torch.equal(out, model.x0[-1]) or preset.mode == "deterministic"
    torch.testing.assert_close(out, model.x0[-1], rtol=1e-5, atol=1e-5)


def test_one_step_students_multiply_the_noise_by_1_32001(noise):
    sigmas = presets.sigmas(PRESETS["dmd2_sdxl_1step"], 1, SD, VE)
    assert float(sigmas[0]) == pytest.approx(1.16058, rel=1e-5)
    n = noise(IMAGE)
    x = start(VE, sigmas[0], n, torch.zeros(IMAGE), "unit")
    torch.testing.assert_close(x / (sigmas[0] * n), torch.full(IMAGE, 1.32001), rtol=5e-6, atol=0)


def test_instarevive_is_its_closed_form(network, noise):
    preset, z = PRESETS["instarevive"], noise(IMAGE)
    model = network(VE, "eps", PIXART)
    out = run(model, preset, presets.sigmas(preset, 1, PIXART, VE), VE, noise(IMAGE, 1), z)
    sigma = PIXART.sigmas[400]
    eps = model._network(z, sigma)
    torch.testing.assert_close(out, (z - math.sqrt(1 - 0.19357) * eps) / math.sqrt(0.19357), rtol=1e-3, atol=1e-3)


def test_dmd2_four_steps_are_lcm_on_simple(gaussian, noise):
    preset, n = PRESETS["dmd2_sdxl_4step"], noise(IMAGE)
    grid = simple(SD, 4)
    assert torch.equal(presets.sigmas(preset, 4, SD, VE), grid)
    x = n * torch.sqrt(1.0 + grid[0] ** 2.0) + torch.zeros(IMAGE)
    lcm = SAMPLERS["lcm"](gaussian(VE), x, grid, {"seed": 7}, disable=True)
    ours = run(gaussian(VE), preset, grid, VE, n, torch.zeros(IMAGE))
    assert torch.equal(ours, lcm)


@pytest.mark.parametrize("path", PATHS)
def test_deterministic_steps_are_euler_but_for_the_last(path, gaussian, noise):
    sigmas = torch.tensor([0.95, 0.8, 0.5, 0.2])
    x = noise(IMAGE)
    euler = SAMPLERS["euler"](gaussian(path), x, sigmas, disable=True, path=path)
    ours = sample_distilled(gaussian(path), x, sigmas, disable=True, path=path, rule=Rule("deterministic"))
    if path is VP:
        torch.testing.assert_close(ours, euler, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(ours, euler)
    ended = torch.cat([sigmas, torch.zeros(1)])
    model = gaussian(path)
    ours = sample_distilled(model, x, ended, disable=True, path=path, rule=Rule("deterministic"))
    torch.testing.assert_close(ours, SAMPLERS["euler"](model, x, ended, disable=True, path=path), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_exact_posterior_means_shrink_the_variance_by_the_closed_form(path, gaussian):
    """The loop is linear in its noises, so their coefficients, read off one by one, give the output's variance.

    With x = a x0 + b n and gain k_i = a_i S^2 / (a_i^2 S^2 + b_i^2), x0 comes out as mu + k_i (x - a_i mu), hence
    V_1 = k_1^2 c^2, V_i = k_i^2 (a_i^2 V_{i-1} + b_i^2), where c scales the start noise: sqrt(1 + sigma^2) on VE,
    noise_scale on FLOW, 1 on VP. The mean starts at k_1 (0 - a_1 mu) + mu and decays to mu likewise.
    """
    S, mu = 0.7, 0.4
    sigmas = torch.tensor([0.999, 0.8, 0.5, 0.25, 0.0] if path.kind == "FLOW" else [14.6146, 4.0817, 1.6129, 0.6932, 0])
    sigmas = sigmas.double()
    shape = (1, 1, 1, 4)
    zero = torch.zeros(shape, dtype=torch.float64)

    def sample(which):
        stream = iter([zero + float(which == k) for k in range(4)])
        x = start(path, sigmas[0], next(stream), zero)
        return sample_distilled(
            gaussian(path, mu, S), x, sigmas, disable=True, path=path, noise_sampler=lambda *_: next(stream)
        )

    mean = sample(None)
    variance = sum((sample(k) - mean) ** 2 for k in range(4))

    expected_mean, expected = 0.0, None
    for s in sigmas[:-1].tolist():
        if path.kind == "VE":
            a, b, c = 1.0, s, math.sqrt(1 + s * s)
        elif path.kind == "FLOW":
            a, b, c = 1 - s, s * path.noise_scale, path.noise_scale
        else:
            a, b, c = 1 / math.sqrt(1 + s * s), s / math.sqrt(1 + s * s), 1.0
        k = a * S**2 / (a**2 * S**2 + b**2)
        inner = c**2 if expected is None else a**2 * expected + b**2
        x_mean = 0.0 if expected is None else a * expected_mean
        expected, expected_mean = k**2 * inner, mu + k * (x_mean - a * mu)
    torch.testing.assert_close(variance, torch.full_like(variance, expected), rtol=1e-9, atol=0)
    torch.testing.assert_close(mean, torch.full_like(mean, expected_mean), rtol=1e-9, atol=1e-12)
    assert expected < S**2


def test_a_trained_student_gives_the_data(noise):
    """mu + S (x - mu) / sqrt(S^2 + sigma^2) is a draw of N(mu, S^2) when x is one of the noised data."""

    def student(x, sigma, **extra_args):
        s = sigma.view(-1, 1, 1, 1)
        return 0.4 + 0.7 * (x - 0.4) / torch.sqrt(0.7**2 + s**2)

    sigmas = simple(SD, 4)
    n = noise((4, 4, 256, 256))
    out = sample_distilled(student, start(VE, sigmas[0], n, None), sigmas, {"seed": 3}, disable=True, path=VE)
    assert float(out.mean()) == pytest.approx(0.4, abs=0.01)
    assert float(out.std()) == pytest.approx(0.7, rel=0.01)


@pytest.mark.parametrize("shape", [(8, 4, 5, 6), (8, 4, 3, 5, 6)], ids=["image", "video"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", PATHS)
def test_batch_of_eight_is_eight_batches_of_one(path, mode, shape, gaussian, noise):
    fresh = [noise(shape, 10 + k) for k in range(3)]
    sigmas = torch.tensor([0.9, 0.0] if mode == "single" else [0.9, 0.6, 0.3, 0.0])

    def sample(rows):
        stream = iter(fresh)
        x = start(path, sigmas[0], noise(shape)[rows], None)
        return sample_distilled(
            gaussian(path), x, sigmas, disable=True, path=path, rule=Rule(mode, 0.4), schedule=table(path),
            noise_sampler=lambda *_: next(stream)[rows],
        )  # fmt: skip

    together = sample(slice(None))
    for k in range(8):
        assert torch.equal(together[k : k + 1], sample(slice(k, k + 1)))


@pytest.mark.parametrize("path", PATHS)
def test_a_truncated_grid_ends_at_its_last_level(path, gaussian, noise):
    x, fresh = noise(IMAGE), noise(IMAGE, 3)
    model = gaussian(path)
    out = sample_distilled(model, x, torch.tensor([0.9, 0.3]), disable=True, path=path, noise_sampler=lambda *_: fresh)
    x0 = model(x, torch.full((2,), 0.9))
    torch.testing.assert_close(out, path.add_noise(x0, 0.3, fresh))
    assert torch.equal(sample_distilled(model, x, torch.tensor([0.9]), disable=True, path=path), x)


class TestStart:
    n = torch.randn(IMAGE, generator=torch.Generator().manual_seed(1))
    z = torch.randn(IMAGE, generator=torch.Generator().manual_seed(2))

    @pytest.mark.parametrize("path", PATHS)
    def test_unit_ignores_an_empty_or_missing_latent(self, path):
        for latent in (None, torch.zeros(IMAGE)):
            for top in (False, True):
                assert torch.equal(start(path, 0.5, self.n, latent, max_denoise=top), path.unit_start(0.5, self.n))

    @pytest.mark.parametrize("path", PATHS)
    def test_image_to_image_is_noised(self, path):
        noised = path.add_noise(self.z, 0.5, self.n)
        assert torch.equal(start(path, 0.5, self.n, self.z), noised)
        assert torch.equal(start(path, 0.5, self.n, self.z, start_sigma=0.9), noised)
        assert torch.equal(start(path, torch.tensor(0.5), self.n, self.z, "noised"), noised)

    @pytest.mark.parametrize("path", PATHS)
    def test_a_student_at_its_own_start_sees_the_noise_alone(self, path):
        x = start(path, torch.tensor(1.16058), self.n, self.z, start_sigma=1.16058)
        assert torch.equal(x, path.unit_start(torch.tensor(1.16058), self.n))

    def test_at_the_highest_level_it_is_core_s_start(self):
        sigma = SD.sigma_max
        x = start(VE, sigma, self.n, self.z, max_denoise=True, start_sigma=float(sigma))
        assert torch.equal(x, self.n * torch.sqrt(1.0 + sigma**2.0) + self.z)
        assert torch.equal(start(FLOW, 1.0, self.n, self.z, max_denoise=True), self.n)

    @pytest.mark.parametrize("path", PATHS)
    def test_noised_without_a_latent_is_noised_emptiness(self, path):
        assert torch.equal(start(path, 0.5, self.n, None, "noised"), path.add_noise(torch.zeros(IMAGE), 0.5, self.n))

    def test_bad_input(self):
        with pytest.raises(ValueError, match="start 'loud' is not known"):
            start(VE, 0.5, self.n, None, "loud")
        with pytest.raises(ValueError, match="connect one"):
            start(VE, 0.5, self.n, None, "latent")
        with pytest.raises(ValueError, match=r"latent image has shape \(1, 4, 5, 6\)"):
            start(VE, 0.5, self.n, self.z[:1])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "single"])
def test_a_run_in_two_parts_is_the_run(path, mode, gaussian, noise):
    """Steps count through, in the callback too, and fresh noise goes on."""
    sigmas, x = torch.tensor([0.9, 0.6, 0.3, 0.1, 0.0]), noise(IMAGE)
    rule, fresh, seen = Rule(mode, 0.4), [noise(IMAGE, 10 + k) for k in range(3)], []

    def sample(x, steps, stream):
        return sample_distilled(
            gaussian(path), x, sigmas, {}, lambda info: seen.append(info["i"]), True, path=path, rule=rule,
            schedule=table(path), noise_sampler=lambda *_: next(stream), steps=steps,
        )  # fmt: skip

    whole, stream = sample(x, None, iter(fresh)), iter(fresh)
    assert torch.equal(sample(sample(x, range(2), stream), range(2, 4), stream), whole)
    assert seen == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["renoise", "ancestral", "tcd"])
def test_how_much_of_the_noise_is_renewed_is_what_eta_says(path, mode, gaussian, noise):
    """The output is affine in the fresh noise: its factor grows with eta, up to the marginal's deviation."""
    sigmas, x = torch.tensor([0.9, 0.6, 0.3]).double(), noise(IMAGE, 1, torch.float64)
    unit = torch.ones(IMAGE, dtype=torch.float64)

    def sample(eta, fresh):
        return sample_distilled(
            gaussian(path), x, sigmas, disable=True, path=path, rule=Rule(mode, eta), schedule=table(path),
            noise_sampler=lambda *_: fresh, steps=range(1, 2),
        )  # fmt: skip

    factors = [float((sample(eta, unit) - sample(eta, 0 * unit)).mean()) for eta in (0.0, 0.4, 1.0)]
    marginal = path.noise_scale * 0.3 if path.kind == "FLOW" else 0.3 / (1.09**0.5 if path is VP else 1.0)
    if mode == "renoise":
        assert factors == pytest.approx([marginal] * 3)
    else:
        assert factors[0] == 0 < factors[1] < factors[2] <= marginal * (1 + 1e-6)


def test_a_rule_has_noise_of_its_own_scale_and_cuts_it(noise):
    rule = Rule(noise_scale=7.5, clip=2.5)
    path = rule.noised(FLOW)
    assert path == NoisePath("FLOW", 7.5) and Rule().noised(VE) is VE
    x0, fresh = noise((2, 4, 64, 64), 1), noise((2, 4, 64, 64), 2)
    out = sample_distilled(
        lambda x, sigma: x0, x0, torch.tensor([0.9, 0.5]), disable=True, path=path, rule=rule,
        noise_sampler=lambda *_: fresh,
    )  # fmt: skip
    limit = 2.5 * fresh.std()
    torch.testing.assert_close(out, 0.5 * 7.5 * fresh.clamp(-limit, limit) + 0.5 * x0)
    with pytest.raises(ValueError, match="noise_scale 7.5 only has a meaning for FLOW"):
        rule.noised(VE)


def test_tcd_needs_the_models_timesteps(gaussian):
    with pytest.raises(ValueError, match="give its schedule"):
        sample_distilled(gaussian(VE), torch.zeros(IMAGE), torch.tensor([1.0, 0.5, 0.0]), path=VE, rule=Rule("tcd"))


def test_bad_modes(gaussian):
    x = torch.zeros(IMAGE)
    with pytest.raises(ValueError, match="mode 'twice' is not known"):
        sample_distilled(gaussian(VE), x, torch.tensor([1.0, 0.0]), path=VE, rule=Rule("twice"))
    with pytest.raises(ValueError, match="makes one call, and the sigmas ask for 2 steps"):
        sample_distilled(gaussian(VE), x, torch.tensor([1.0, 0.5, 0.0]), path=VE, rule=Rule("single"))


@pytest.mark.parametrize("mode", ["renoise", "deterministic"])
def test_divergence_is_named(mode, noise):
    def model(x, sigma, **extra_args):
        return x / 0 if float(sigma[0]) < 1 else x

    with pytest.raises(SamplingDiverged, match=r"step 2 of 2 \(sigma 0.5\)"):
        sample_distilled(model, noise(IMAGE), torch.tensor([1.0, 0.5, 0.0]), disable=True, path=VE, rule=Rule(mode))


def test_callback_is_k_diffusion_s(gaussian, noise):
    seen = []
    sample_distilled(gaussian(VE), noise(IMAGE), simple(SD, 4), {"seed": 1}, seen.append, True, path=VE)
    assert [set(info) for info in seen] == [{"x", "i", "sigma", "sigma_hat", "denoised"}] * 4
    assert [info["i"] for info in seen] == [0, 1, 2, 3]
