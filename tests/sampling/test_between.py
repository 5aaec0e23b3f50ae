"""Steps that renew a part of the noise, labels of another timestep, and where a second network goes on."""

from __future__ import annotations

import math

import pytest
import torch

from retort.sampling.between import ancestral, clipped, handover, tcd, told
from retort.sampling.path import FLOW, VE, VP, NoisePath
from retort.sampling.schedule import DiscreteSchedule, FlowSchedule
from retort.sampling.standard import SAMPLERS

SD, COG = DiscreteSchedule(), DiscreteSchedule(zsnr=True)
PATHS = [VE, NoisePath("VE", sigma_data=0.5), VP, FLOW, NoisePath("FLOW", 7.5)]
SHAPE = (3, 4, 5, 6)
QUARTERS = (999, 749, 499, 249)


def grid(path):
    """Four trained levels and zero."""
    if path.kind == "FLOW":
        return torch.tensor([1.0, 0.9375, 0.83333, 0.625, 0.0])
    return torch.cat([(COG if path is VP else SD).sigmas[list(QUARTERS)], torch.zeros(1)])


def schedule(path):
    return FlowSchedule(3.0) if path.kind == "FLOW" else COG if path is VP else SD


def steps_of(mode, path, sigmas, eta):
    return ancestral(path, sigmas, eta) if mode == "ancestral" else tcd(path, schedule(path), sigmas, eta)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mode", ["ancestral", "tcd"])
def test_each_step_ends_at_its_level_whatever_part_of_the_noise_is_renewed(mode, eta, path, noise):
    """With the true x0 the latent is a x0 + b m, where m is unit noise: old and new noise share it in closed form."""
    sigmas = grid(path).double()
    x0, old, new = (noise(SHAPE, k, torch.float64) for k in range(3))
    partly = steps_of(mode, path, sigmas, eta)
    for i in range(3):
        here, there = sigmas[i], sigmas[i + 1]
        x = path.add_noise(x0, here, old)
        for fresh in (new, torch.zeros_like(new)):
            found = path.noise_from(partly.step(i, x, x0, here, there, fresh), x0, there)
            kept = ((found - fresh * partly.up[i] / there) / old).mean()
            torch.testing.assert_close(found, kept * old + partly.up[i] / there * fresh, rtol=1e-7, atol=1e-7)
            assert float(kept**2 + (partly.up[i] / there) ** 2) == pytest.approx(1, abs=1e-7)
    if eta == 0:
        assert not partly.up.any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", ["ancestral", "tcd"])
def test_none_of_the_noise_renewed_is_the_deterministic_step(mode, path, noise):
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 1e-3)):
        sigmas, x, x0, fresh = grid(path).to(dtype), *(noise(SHAPE, k, dtype) for k in range(3))
        partly = steps_of(mode, path, sigmas, 0.0)
        for i in range(3):
            found = partly.step(i, x, x0, sigmas[i], sigmas[i + 1], fresh)
            expected = path.move(x, x0, sigmas[i], sigmas[i + 1])
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("path", [FLOW, NoisePath("FLOW", 7.5)])
def test_all_of_it_renewed_on_a_flow_is_noising_again(path, noise):
    sigmas, x, x0, fresh = grid(path), noise(SHAPE), noise(SHAPE, 1), noise(SHAPE, 2)
    found = tcd(path, schedule(path), sigmas, 1.0).step(1, x, x0, sigmas[1], sigmas[2], fresh)
    torch.testing.assert_close(found, path.add_noise(x0, sigmas[2], fresh))


def test_sd_turbo_renews_most_of_its_noise():
    """Of the variance at 749, 499: 92 % and 84 % (the published levels 999, 899, 799 renew less at a time)."""
    partly, levels = ancestral(VE, grid(VE), 1.0), grid(VE)
    assert (partly.up**2 / levels[1:] ** 2)[:2].tolist() == pytest.approx([0.92, 0.84], abs=0.005)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("path", [VE, VP])
def test_tcd_is_its_authors_scheduler(eta, path, noise):
    """diffusers' TCDScheduler, which is the authors' code, step by step with the same noise; in float32."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.TCDScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="sample",
        rescale_betas_zero_snr=False,
    )  # fmt: skip
    theirs.set_timesteps(timesteps=list(QUARTERS))
    sigmas = torch.cat([SD.sigmas[list(QUARTERS)], torch.zeros(1)])
    partly = tcd(path, SD, sigmas, eta)
    x = path.add_noise(noise(SHAPE, 1), sigmas[0], noise(SHAPE, 2))
    for i in range(3):
        sigma, there = sigmas[i], sigmas[i + 1]
        x0 = noise(SHAPE, 10 + i)
        vp = x if path is VP else x / (1 + sigma**2).sqrt()
        expected = theirs.step(
            x0, QUARTERS[i], vp, eta=eta, generator=torch.Generator().manual_seed(i), return_dict=False
        )[0]
        fresh = torch.randn(SHAPE, generator=torch.Generator().manual_seed(i))
        x = partly.step(i, x, x0, sigma, there, fresh)
        torch.testing.assert_close(x if path is VP else x / (1 + there**2).sqrt(), expected, rtol=2e-5, atol=2e-5)


def test_tcd_goes_down_to_a_whole_timestep():
    down = tcd(VE, SD, grid(VE), 0.3).down
    assert SD.timestep(down[:3]).tolist() == [math.floor(0.7 * t) for t in QUARTERS[1:]] and float(down[3]) == 0


@pytest.mark.parametrize("path", PATHS)
def test_ancestral_is_the_standard_sampler_to_the_bit(path, gaussian, noise):
    sigmas, fresh = grid(path), [noise(SHAPE, 10 + i) for i in range(4)]
    partly, model = ancestral(path, sigmas, 0.6), gaussian(path)
    x = noise(SHAPE)
    stream = iter(fresh)
    expected = SAMPLERS["euler_ancestral"](
        gaussian(path), x, sigmas, disable=True, path=path, eta=0.6, noise_sampler=lambda *_: next(stream)
    )
    for i in range(4):
        x0 = model(x, sigmas[i].expand(len(x)))
        x = x0 if i == 3 else partly.step(i, x, x0, sigmas[i], sigmas[i + 1], fresh[i])
    if path is VP:
        torch.testing.assert_close(x, expected)
    else:
        assert torch.equal(x, expected)


@pytest.mark.parametrize(("path", "prediction"), [(VE, "eps"), (VE, "v"), (VP, "v"), (FLOW, "flow")])
@pytest.mark.parametrize("scale", [0.25, 0.5, 1.0])
def test_a_network_is_told_a_part_of_its_timestep_and_sees_what_it_saw(scale, path, prediction, network, noise):
    """Its answer is read at the level of what it is told: a' and b' of that level, in the formula of its prediction."""
    table, x = schedule(path), noise(SHAPE)
    levels = torch.tensor([1.0, 0.8333, 0.625]) if path.kind == "FLOW" else table.sigmas[[999, 499, 249]]
    plain, shown = network(path, prediction, table), network(path, prediction, table)
    plain(x, levels)
    y, told_levels = told(x, levels, scale, table, path)
    x0 = shown(y, told_levels)
    torch.testing.assert_close(shown.inputs[0], plain.inputs[0], rtol=1e-6, atol=1e-6)
    if path.kind == "FLOW":
        assert shown.timesteps[0] == pytest.approx([scale * t for t in plain.timesteps[0]])
    else:
        assert shown.timesteps[0] == [math.floor(scale * t) for t in (999, 499, 249)]
    s = told_levels.double().view(-1, 1, 1, 1)
    a, b = (1 - s, s) if path is FLOW else (1 / (1 + s**2).sqrt(), s / (1 + s**2).sqrt())
    seen = shown.inputs[0].double()
    answer = shown._network(seen, s)
    expected = {"eps": (seen - b * answer) / a, "v": a * seen - b * answer, "flow": seen - s * answer}[prediction]
    torch.testing.assert_close(x0.double(), expected, rtol=1e-4, atol=1e-4)


def test_clipping_cuts_at_deviations_of_the_noise_itself(noise):
    n = noise((2, 4, 64, 64)) * 3
    cut = clipped(n, 2.5)
    assert float(cut.abs().max()) == pytest.approx(2.5 * float(n.std())) and clipped(n, None) is n
    assert torch.equal(cut[n.abs() < 7], n[n.abs() < 7])


def shifted(shift, steps):
    t = torch.arange(steps, 0, -1) / steps
    return torch.cat([shift * t / (1 + (shift - 1) * t), torch.zeros(1)])


@pytest.mark.parametrize(
    ("boundary", "shift", "counts"),
    [(0.875, 5, (2, 3, 4)), (0.875, 8, (3, 4, 5)), (0.9, 5, (2, 3, 3)), (0.9, 8, (2, 3, 4))],
)
def test_the_first_of_two_networks_makes_the_steps_at_and_above_the_boundary(boundary, shift, counts):
    """Wan 2.2's (t2v .875, i2v .9) at 4, 6 and 8 steps: in five of the twelve it is not half of them."""
    assert tuple(handover(shifted(shift, steps), boundary) for steps in (4, 6, 8)) == counts


def test_a_level_on_the_boundary_belongs_to_the_first_network():
    assert handover(torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]), 0.9) == 2  # float32's 0.9 is below 0.9
    assert handover(shifted(7, 4), 0.875) == 3
    assert handover(torch.tensor([0.5, 0.25, 0.0]), 0.9) == 0
    assert handover(torch.tensor([1.0, 0.95]), 0.9) == 1
