"""How far solvers step: Dormand-Prince's first step and its control, DPM-Solver++(2M) on uneven levels."""

from __future__ import annotations

import math

import pytest
import torch

from retort.sampling.dopri5 import Dopri5Config, sample_dopri5, step
from retort.sampling.path import FLOW, VE
from retort.sampling.standard import sample_dpmpp_2m

BOTH = pytest.mark.parametrize("path", [VE, FLOW], ids=["VE", "FLOW"])
TOP = {"VE": 14.0, "FLOW": 0.95}
LOW = 0.02


def slope_of(model):
    return lambda x, sigma: (x - model(x, torch.full((len(x),), sigma, dtype=x.dtype))) / sigma


def norm(error, x, other, config):
    scale = config.atol + config.rtol * torch.maximum(x.abs(), other.abs())
    return float((error / scale).square().mean((1, 2, 3)).sqrt().max())


def sampled(model, x, path, config):
    """The levels after each accepted step, and the first two calls of the model."""
    levels = [TOP[path.kind]]
    ends = torch.tensor([levels[0], LOW], dtype=torch.float64)
    sample_dopri5(
        model, x, ends, callback=lambda info: levels.append(float(info["sigma"])), disable=True, path=path,
        config=config,
    )  # fmt: skip
    return levels


@BOTH
def test_the_first_step_is_found_from_one_call_further_down(path, gaussian, noise):
    """Hairer et al., II.4: h0 = 0.01 |x| / |k|, one Euler step of it down, h = (0.01 / max(|k|, |k'|))^(1/5)."""
    x, config = TOP[path.kind] * noise((2, 4, 3, 3), dtype=torch.float64), Dopri5Config()
    model = gaussian(path)
    levels = sampled(model, x, path, config)
    slope, top = slope_of(gaussian(path)), TOP[path.kind]
    k = slope(x, top)
    size, speed = norm(x, x, x, config), norm(k, x, x, config)
    guess = 0.01 * size / speed
    there = x - guess * k
    torch.testing.assert_close(model.inputs[1], there, rtol=1e-12, atol=1e-12)
    assert model.sigmas[1].tolist() == pytest.approx([top - guess] * 2, rel=1e-12)
    bend = norm(slope(there, top - guess) - k, x, x, config) / guess
    first = min(100 * guess, (0.01 / max(speed, bend)) ** 0.2)
    assert float(top - model.sigmas[2][0]) == pytest.approx(first / 5, rel=1e-9)
    assert levels[1] == pytest.approx(top - first, rel=1e-9)


@BOTH
def test_the_next_step_follows_the_fifth_root_of_the_error(path, gaussian, noise):
    """h' = 0.9 h |error|^(-1/5), between a fifth and ten times h; a tolerance of many steps."""
    x, config = TOP[path.kind] * noise((2, 4, 3, 3), dtype=torch.float64), Dopri5Config(1e-8, 1e-8, 10_000)
    levels = sampled(gaussian(path), x, path, config)
    slope, state, smaller = slope_of(gaussian(path)), x, False
    # Not the last step, which is cut to the end.
    for here, there, after in zip(levels, levels[1:], levels[2:-1], strict=False):
        ahead, error, _ = step(slope, state, here, there - here, slope(state, here))
        growth = factor(norm(error, state, ahead, config))
        # A step that follows a rejected one does not grow.
        h, state = (here - there) * (min(1.0, growth) if smaller else growth), ahead
        smaller = False
        while (size := tried(slope, state, there, h, config)) > 1:
            h, smaller = h * factor(size), True
        assert there - after == pytest.approx(h, rel=1e-4)
    assert len(levels) > 10


def factor(size):
    return min(10.0, max(0.2, 0.9 * size**-0.2))


def tried(slope, x, sigma, h, config):
    ahead, error, _ = step(slope, x, sigma, -h, slope(x, sigma))
    return norm(error, x, ahead, config)


@BOTH
def test_dpmpp_2m_on_uneven_levels_extrapolates_by_the_ratio_of_steps(path, noise):
    """x0 + (x0 - x0 before) h / (2 h before), h in -log sigma: here once twice as long as before and once a third."""
    x = noise((2, 4, 3, 3), 1, torch.float64)
    answers = [noise((2, 4, 3, 3), 2 + k, torch.float64) for k in range(4)]
    steps = [0.2, 0.4, 0.4 / 3]
    sigmas = [0.9]
    for h in steps:
        sigmas.append(sigmas[-1] * math.exp(-h))
    wanted = x
    for k, h in enumerate(steps):
        target = answers[k] if k == 0 else answers[k] + (answers[k] - answers[k - 1]) * h / (2 * steps[k - 1])
        wanted = math.exp(-h) * wanted + (1 - math.exp(-h)) * target
    given = iter(answers)
    levels = torch.tensor(sigmas, dtype=torch.float64)
    out = sample_dpmpp_2m(lambda x, s: next(given), x, levels, disable=True, path=path)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)


@BOTH
def test_dpmpp_2m_is_of_second_order_on_alternately_long_and_short_steps(path, gaussian, noise):
    model, x = gaussian(path), 3 * noise((2, 4, 3, 3), dtype=torch.float64)

    def error(pairs):
        lengths = torch.tensor([1.0, 3.0] * pairs, dtype=torch.float64).cumsum(0) / (4 * pairs)
        depth = math.log(TOP[path.kind] / 0.05)
        sigmas = TOP[path.kind] * (-depth * torch.cat([torch.zeros(1, dtype=torch.float64), lengths])).exp()
        out = sample_dpmpp_2m(model, x, sigmas, disable=True, path=path)
        return float((out - model.ode(x, sigmas[0], sigmas[-1])).abs().max())

    assert math.log2(error(80) / error(160)) == pytest.approx(2, abs=0.2)
