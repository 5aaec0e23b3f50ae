"""NoisePath: the three coordinate systems against their formulas, written out again here."""

from __future__ import annotations

import math

import pytest
import torch

from retort.sampling.path import FLOW, RECTIFIED, VE, VP, NoisePath, level_of, time_of

PATHS = [VE, FLOW, VP, NoisePath("FLOW", 8.0), RECTIFIED]
SHAPES = [(3, 4, 5, 6), (3, 2, 4, 5, 6)]


def expected(path, x0, s, n):
    if path.kind == "VE":
        return x0 + s * n
    if path.kind == "FLOW":
        return (1 - s) * x0 + s * path.noise_scale * n
    return x0 / math.sqrt(1 + s * s) + s / math.sqrt(1 + s * s) * n


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", PATHS)
def test_add_noise_is_the_formula(path, shape, noise):
    x0, n = noise(shape, 1), noise(shape, 2)
    for s in (0.05, 0.6, 0.999):
        torch.testing.assert_close(path.add_noise(x0, s, n), expected(path, x0, s, n), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", PATHS)
def test_float_tensor_and_batched_levels_agree(path, shape, noise):
    x0, n = noise(shape, 1), noise(shape, 2)
    levels = torch.tensor([0.2, 0.5, 0.9])
    for call in (
        lambda s, x, m: path.add_noise(x, s, m),
        lambda s, x, m: path.unit_start(s, m),
        lambda s, x, m: path.unit_input(s, x),
        lambda s, x, m: path.noise_from(m, x, s),
        lambda s, x, m: path.move(m, x, s, s / 2),
    ):
        together = call(levels, x0, n)
        for k, level in enumerate(levels):
            one = x0[k : k + 1], n[k : k + 1]
            assert torch.equal(together[k : k + 1], call(level, *one))
            assert torch.equal(together[k : k + 1], call(float(level), *one))


@pytest.mark.parametrize("path", PATHS)
def test_noise_from_inverts_add_noise(path, noise):
    x0, n = noise((2, 4, 5, 6), 1, torch.float64), noise((2, 4, 5, 6), 2, torch.float64)
    for s in (0.05, 0.6, 1.0):
        torch.testing.assert_close(path.noise_from(path.add_noise(x0, s, n), x0, s), n, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
def test_move_keeps_the_noise(path, noise):
    x0, n = noise((2, 4, 5, 6), 1, torch.float64), noise((2, 4, 5, 6), 2, torch.float64)
    moved = path.move(path.add_noise(x0, 0.8, n), x0, 0.8, 0.3)
    torch.testing.assert_close(moved, path.add_noise(x0, 0.3, n), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(path.move(path.add_noise(x0, 0.8, n), x0, 0.8, 0.0), x0, rtol=1e-12, atol=1e-12)


def test_unit_start_makes_the_noise_the_network_input(noise):
    n = noise((2, 4, 5, 6))
    sigma = torch.tensor(1.16058)
    network_input = VE.unit_start(sigma, n) / (sigma**2 + 1) ** 0.5
    torch.testing.assert_close(network_input, n, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(VE.unit_start(sigma, n) / (sigma * n), torch.full_like(n, 1.32001), rtol=5e-6, atol=0)
    assert torch.equal(FLOW.unit_start(sigma, n), n)
    assert torch.equal(NoisePath("FLOW", 8.0).unit_start(sigma, n), 8.0 * n)
    assert torch.equal(VP.unit_start(sigma, n), n)


def test_unit_input_feeds_a_clean_latent(noise):
    z = noise((2, 4, 5, 6))
    torch.testing.assert_close(VE.unit_input(2.04, z) / math.sqrt(1 + 2.04**2), z, rtol=1e-6, atol=1e-6)
    assert torch.equal(FLOW.unit_input(0.4, z), z)
    assert torch.equal(VP.unit_input(2.04, z), z)


def test_a_rectified_flow_carried_as_ve_is_the_flow_at_its_time(noise):
    """x = z / (1 - t): noising, moving and the noise within are FLOW's, and the network is shown z."""
    x0, n = noise((3, 4, 5, 6), 1, torch.float64), noise((3, 4, 5, 6), 2, torch.float64)
    time, there = torch.tensor([0.02, 0.5, 0.98]).double(), torch.tensor([0.01, 0.3, 0.5]).double()
    sigma, low, kept = level_of(time), level_of(there), (1 - time).view(-1, 1, 1, 1)
    torch.testing.assert_close(time_of(sigma), time, rtol=1e-14, atol=0)
    x, z = RECTIFIED.add_noise(x0, sigma, n), FLOW.add_noise(x0, time, n)
    torch.testing.assert_close(x * kept, z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x / RECTIFIED.shrinking(sigma).view(-1, 1, 1, 1), z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(RECTIFIED.noise_from(x, x0, sigma), FLOW.noise_from(z, x0, time), rtol=1e-9, atol=1e-9)
    moved = RECTIFIED.move(x, x0, sigma, low) * (1 - there).view(-1, 1, 1, 1)
    torch.testing.assert_close(moved, FLOW.move(z, x0, time, there), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(RECTIFIED.unit_input(sigma, x0) * kept, x0, rtol=1e-12, atol=1e-12)
    assert torch.equal(RECTIFIED.unit_start(sigma, n), sigma.view(-1, 1, 1, 1) * n)
    assert RECTIFIED.flow and FLOW.flow and not VE.flow and not VP.flow


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="'EDM' is not known"):
        NoisePath("EDM")
    with pytest.raises(ValueError, match="noise_scale must be a positive number, got 0"):
        NoisePath("FLOW", 0.0)
    with pytest.raises(ValueError, match="only has a meaning for FLOW"):
        NoisePath("VE", 2.0)
    for kind, data in (("FLOW", 1.0), ("VP", 1.0), ("VE", 0.5)):
        with pytest.raises(ValueError, match="leave rectified at False"):
            NoisePath(kind, sigma_data=data, rectified=True)
    with pytest.raises(ValueError, match=r"one level per item, shape \(3,\)"):
        VE.add_noise(torch.zeros(3, 4, 5, 6), torch.ones(2), torch.zeros(3, 4, 5, 6))
