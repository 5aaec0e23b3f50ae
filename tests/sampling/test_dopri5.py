"""Dormand-Prince against exact flows: order, tolerance, a single datum, batches, and what a run is told."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate

from retort.sampling.dopri5 import _A, _C, _E, Dopri5Config, Spent, sample_dopri5, step
from retort.sampling.path import FLOW, VE, VP, NoisePath
from retort.sampling.standard import SamplingDiverged

PATHS = [VE, FLOW, VP, NoisePath("FLOW", 8.0)]
TOP = {"VE": 14.0, "FLOW": 0.95, "VP": 14.0}
LOW = 0.02


def ends(path, low=LOW):
    return torch.tensor([TOP[path.kind], low], dtype=torch.float64)


def tight(tolerance=1e-9, most=100_000):
    return Dopri5Config(tolerance, tolerance, most)


def test_the_tableau_is_scipys():
    theirs = integrate.RK45
    assert torch.allclose(torch.tensor(_C[:5]), torch.tensor(theirs.C[1:], dtype=torch.float32))
    for mine, row in zip(_A, theirs.A[1:], strict=False):
        assert mine == pytest.approx(tuple(row[: len(mine)]), abs=1e-15)
    assert _A[-1] == pytest.approx(tuple(theirs.B), abs=1e-15)
    assert tuple(-e for e in _E) == pytest.approx(tuple(theirs.E), abs=1e-15)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tolerance", [1e-5, 1e-9])
def test_a_gaussian_s_flow_is_exact_to_the_tolerance(path, tolerance, gaussian, noise):
    """VE: sqrt((S^2 + s^2) / (S^2 + t^2)); FLOW: sqrt((a'^2 S^2 + b'^2) / (a^2 S^2 + b^2)) about a mu."""
    model, told = gaussian(path), []
    x = TOP[path.kind] * noise((3, 4, 5, 5), dtype=torch.float64)
    out = sample_dopri5(
        model, x, ends(path), disable=True, path=path, config=tight(tolerance), report=told.append
    )  # fmt: skip
    exact = model.ode(x, TOP[path.kind], LOW)
    assert float((out - exact).abs().max()) < 30 * tolerance * max(1.0, float(exact.abs().max()))
    assert told[0].calls == len(model.sigmas) == 2 + 6 * (told[0].accepted + told[0].rejected)


def slope_of(model):
    return lambda x, sigma: (x - model(x, torch.full((len(x),), sigma, dtype=x.dtype))) / sigma


@pytest.mark.parametrize("path", [VE, FLOW])
def test_equal_steps_converge_with_the_fifth_power_of_their_number(path, gaussian, noise):
    model, x = gaussian(path), noise((2, 4, 5, 5), dtype=torch.float64)
    slope = slope_of(model)

    def error(steps):
        out, levels = x, torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64).tolist()
        for here, there in zip(levels, levels[1:], strict=False):
            out = step(slope, out, here, there - here, slope(out, here))[0]
        return float((out - model.ode(x, 0.9, 0.1)).abs().max())

    assert math.log2(error(40) / error(80)) == pytest.approx(5, abs=0.25)


def test_the_estimate_of_a_step_s_error_is_of_fifth_order_and_its_last_slope_the_next_s_first(gaussian, noise):
    slope, x = slope_of(gaussian(VE)), noise((2, 4, 5, 5), dtype=torch.float64)

    def estimate(h):
        ahead, error, slopes = step(slope, x, 0.9, -h, slope(x, 0.9))
        assert torch.equal(slopes[-1], slope(ahead, 0.9 - h))
        return float(error.abs().max())

    assert math.log2(estimate(0.04) / estimate(0.02)) == pytest.approx(5, abs=0.1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_single_datum_is_reached_exactly(path, dtype, noise):
    y, n = noise((2, 4, 5, 5), 1, dtype), noise((2, 4, 5, 5), 2, dtype)
    told = []
    for low in (LOW, 0.0):
        sigmas = torch.tensor([TOP[path.kind], 0.3, low], dtype=dtype)
        x = path.add_noise(y, sigmas[0], n)
        out = sample_dopri5(
            lambda x, s: y, x, sigmas, disable=True, path=path, sigma_min=0.002, report=told.append
        )  # fmt: skip
        assert out.dtype == dtype
        # In fp32 the slope is rounded by its own size, and what that makes of a step is held to the tolerance of 1e-5.
        within = 1e-10 if dtype == torch.float64 else 5e-5 * path.noise_scale
        torch.testing.assert_close(out, path.add_noise(y, sigmas[-1], n), rtol=within, atol=within)
    # The slope is constant: every step is accepted and ten times as long as the one before.
    assert all(spent.rejected == 0 and spent.accepted < 12 for spent in told) or dtype == torch.float32


@pytest.mark.parametrize("path", PATHS)
def test_a_grid_to_zero_ends_with_x0_at_the_lowest_level(path, gaussian, noise):
    x = TOP[path.kind] * noise((2, 4, 5, 5), dtype=torch.float64)
    sigmas = torch.tensor([TOP[path.kind], 0.5, 0.0], dtype=torch.float64)
    for lowest, level in ((0.02, 0.02), (None, 0.5), (100.0, TOP[path.kind])):
        model = gaussian(path)
        out = sample_dopri5(model, x, sigmas, disable=True, path=path, config=tight(), sigma_min=lowest)
        below = model.ode(x, TOP[path.kind], level)
        exact = model(below, torch.full((2,), level, dtype=torch.float64))
        torch.testing.assert_close(out, exact, rtol=1e-6, atol=1e-6)
        assert min(float(s.min()) for s in model.sigmas) >= level - 1e-9


@pytest.mark.parametrize("path", [VE, FLOW, VP])
@pytest.mark.parametrize("shape", [(8, 4, 5, 5), (8, 4, 3, 5, 5)])
def test_a_batch_of_eight_is_eight_batches_to_the_tolerance(path, shape, gaussian, noise):
    x = (
        TOP[path.kind]
        * noise(shape, dtype=torch.float64)
        * torch.linspace(0.1, 3, 8).view(-1, *(1,) * (len(shape) - 1))
    )
    config = tight(1e-7)
    whole = sample_dopri5(gaussian(path), x, ends(path), disable=True, path=path, config=config)
    parts = [sample_dopri5(gaussian(path), x[i : i + 1], ends(path), disable=True, path=path, config=config)
             for i in range(8)]  # fmt: skip
    assert float((whole - torch.cat(parts)).abs().max()) < 30e-7 * max(1.0, float(whole.abs().max()))


def test_it_agrees_with_scipy_on_a_flow_that_bends(noise):
    """A mixture of two points, whose slope is not linear in x, by dopri5 and by scipy's DOP853."""

    def slope(x, sigma):
        weights = torch.softmax(torch.stack([-((x - p) ** 2) / (2 * sigma**2) for p in (-1.0, 1.0)]), 0)
        return (x - (weights[1] - weights[0])) / sigma

    x = 3 * noise((1, 1, 4, 4), dtype=torch.float64)
    out = sample_dopri5(
        lambda x, s: x - s.view(-1, 1, 1, 1) * slope(x, s.view(-1, 1, 1, 1)), x,
        torch.tensor([3.0, 0.3], dtype=torch.float64), disable=True, path=VE, config=tight(1e-10),
    )  # fmt: skip
    exact = integrate.solve_ivp(
        lambda s, v: slope(torch.from_numpy(v), s).numpy(), (3.0, 0.3), x.flatten().numpy(), "DOP853", rtol=1e-12,
        atol=1e-12,
    ).y[:, -1]  # fmt: skip
    torch.testing.assert_close(out.flatten(), torch.from_numpy(exact), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", [VE, FLOW, VP])
def test_the_callback_follows_the_grid_and_ends_with_the_result(path, gaussian, noise):
    seen, model = [], gaussian(path)
    sigmas = torch.tensor([TOP[path.kind], 0.6, 0.3, 0.0])
    x = noise((2, 4, 5, 6)) * TOP[path.kind]
    out = sample_dopri5(model, x, sigmas, {"seed": 1}, seen.append, True, path=path, sigma_min=0.03)
    assert [info["i"] for info in seen] == sorted(info["i"] for info in seen)
    assert seen[-1]["i"] == 2 and len({info["i"] for info in seen}) > 1
    assert all(set(info) == {"x", "i", "sigma", "sigma_hat", "denoised"} for info in seen)
    torch.testing.assert_close(seen[-1]["denoised"], out)
    for info in seen:
        exact = model.ode(x.double(), TOP[path.kind], float(info["sigma"]))
        torch.testing.assert_close(info["x"].double(), exact, rtol=1e-3, atol=1e-3)


def test_what_stops_it_says_so(gaussian, noise):
    x = 14 * noise((1, 4, 5, 5))
    with pytest.raises(ValueError, match=r"max_calls \(20\) are spent at sigma .* raise atol and rtol"):
        sample_dopri5(gaussian(VE), x, ends(VE), disable=True, config=Dopri5Config(1e-9, 1e-9, 20))
    with pytest.raises(SamplingDiverged, match="model returned NaN or infinity at sigma .*fp32"):
        sample_dopri5(lambda x, s: x * (math.nan if float(s[0]) < 7 else 0), x, ends(VE), disable=True)
    with pytest.raises(SamplingDiverged, match="entered dopri5 at sigma 14 already holds NaN"):
        sample_dopri5(gaussian(VE), x * math.nan, ends(VE), disable=True)
    with pytest.raises(ValueError, match="sigmas must descend, got 0.5, 4"):
        sample_dopri5(gaussian(VE), x, torch.tensor([0.5, 4.0]), disable=True)
    for field, bad in (("atol", 0.0), ("rtol", 2.0), ("max_calls", 9)):
        with pytest.raises(ValueError, match=f"{field} must be"):
            Dopri5Config(**{field: bad})


def test_no_levels_to_move_between_leave_the_latent_alone(gaussian, noise):
    x = noise((2, 4, 5, 6))
    for path in (VE, VP):
        for sigmas in (torch.tensor([0.5]), torch.empty(0)):
            assert torch.equal(sample_dopri5(gaussian(path), x, sigmas, disable=True, path=path), x)


def test_what_a_run_took_reads_well():
    assert str(Spent(74, 11, 1)) == "dopri5: 74 calls, 11 steps, 1 rejected"
