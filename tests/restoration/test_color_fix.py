"""Colour fixes: what each keeps of either picture."""

from __future__ import annotations

import pytest
import torch

from retort.restoration.color_fix import LEVELS, METHODS, coarse, color_fix

# A pixel of the coarse part depends on pixels this far away.
REACH = 2**LEVELS - 1


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(1, 1), (1, 70), (33, 64)])
def test_a_picture_has_its_own_colours_already(method, size):
    picture = draw(2, *size, 3)
    torch.testing.assert_close(color_fix(picture, picture, method), picture, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", ["wavelet", "adain"])
def test_a_constant_becomes_the_other(method):
    restored, degraded = torch.full((1, 40, 50, 3), 0.2), torch.full((1, 40, 50, 3), 0.7)
    torch.testing.assert_close(color_fix(restored, degraded, method), degraded, atol=1e-6, rtol=0)


def test_wavelet_keeps_what_is_fine_and_takes_what_is_coarse():
    restored, degraded = draw(1, 96, 80, 3), draw(1, 96, 80, 3, seed=1)
    fixed = color_fix(restored, degraded, "wavelet")
    expected = restored - coarse(restored) + coarse(degraded)
    torch.testing.assert_close(fixed, expected, atol=1e-6, rtol=0)
    # A tint goes, whatever the detail.
    torch.testing.assert_close(color_fix(restored + 0.3, degraded, "wavelet"), fixed, atol=1e-6, rtol=0)


def test_coarse_is_the_binomial_cascade():
    """An impulse spreads as the product of the kernels does; its sum stays, and nothing is beyond the reach."""
    size = 2 * REACH + 21
    impulse = torch.zeros(1, size, size, 1, dtype=torch.float32)
    impulse[0, size // 2, size // 2] = 1
    line = torch.zeros(size, dtype=torch.float64)
    line[size // 2] = 1
    for level in range(5):
        line = line / 2 + (line.roll(2**level) + line.roll(-(2**level))) / 4
    got = coarse(impulse)[0, :, :, 0]
    torch.testing.assert_close(got, torch.outer(line, line).float(), atol=1e-7, rtol=0)
    assert float(got[size // 2 - REACH - 1].abs().max()) == 0 and float(got[size // 2 - REACH].max()) > 0


def test_adain_takes_mean_and_deviation():
    restored, degraded = draw(2, 30, 20, 3), draw(2, 30, 20, 3, seed=1) * 0.3 + 0.4
    fixed = color_fix(restored, degraded, "adain")
    torch.testing.assert_close(fixed.mean((1, 2)), degraded.mean((1, 2)), atol=1e-5, rtol=0)
    torch.testing.assert_close(fixed.std((1, 2)), degraded.std((1, 2)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_eight_at_once_are_eight_times_one(method):
    restored, degraded = draw(8, 20, 30, 3), draw(8, 20, 30, 3, seed=1)
    singly = [color_fix(restored[i : i + 1], degraded[i : i + 1], method) for i in range(8)]
    torch.testing.assert_close(color_fix(restored, degraded, method), torch.cat(singly))


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="not known"):
        color_fix(draw(1, 4, 4, 3), draw(1, 4, 4, 3), "hue")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="same size"):
        color_fix(draw(1, 4, 4, 3), draw(1, 4, 5, 3), "none")
