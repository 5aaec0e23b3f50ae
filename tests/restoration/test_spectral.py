"""Spectral guidance: written-out gradients against automatic ones and differences, and what each part cannot see."""

from __future__ import annotations

import math

import pytest
import torch

from retort.restoration import spectral
from retort.restoration.spectral import SpectralConfig, guided

SHAPES = [(2, 4, 8, 8), (1, 3, 7, 5), (2, 2, 3, 6, 5), (1, 1, 1, 9), (1, 2, 1, 1)]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("part", ["amplitude", "structure"])
def test_gradients(part, shape):
    loss = getattr(spectral, f"{part}_loss")
    gradient = getattr(spectral, f"{part}_gradient")
    x, r = draw(*shape).requires_grad_(), draw(*shape, seed=1)
    (automatic,) = torch.autograd.grad(loss(x, r).sum(), x)
    torch.testing.assert_close(gradient(x.detach(), r), automatic, atol=1e-10, rtol=1e-8)
    direction, h = draw(*shape, seed=2), 1e-6
    x = x.detach()
    difference = (loss(x + h * direction, r) - loss(x - h * direction, r)).sum() / (2 * h)
    torch.testing.assert_close((automatic * direction).sum(), difference, atol=1e-5, rtol=1e-5)


def test_the_amplitude_does_not_know_where_anything_lies():
    x = draw(1, 3, 8, 10)
    shifted = x.roll((3, 5), (-2, -1))
    assert float(spectral.amplitude_loss(x, shifted)) < 1e-12
    assert float(spectral.structure_loss(x, shifted)) > 1
    assert float(spectral.amplitude_loss(x, x)) == 0 and float(spectral.structure_loss(x, x)) == 0
    assert not torch.count_nonzero(spectral.amplitude_gradient(x, x))
    assert torch.isfinite(spectral.amplitude_gradient(torch.zeros_like(x), x)).all()


def test_phi_never_enlarges_and_leaves_what_is_flat():
    x = draw(3, 2, 16, 16)
    norm = sum(part.square().sum() for part in spectral.pyramid(x))
    assert norm <= x.square().sum()
    flat = torch.full((1, 2, 6, 6), 0.3, dtype=torch.float64)
    assert max(float(part.abs().max()) for part in spectral.pyramid(flat)) < 1e-15


def test_a_step_goes_downhill():
    x, r = draw(2, 4, 16, 16).float(), draw(2, 4, 16, 16, seed=1).float()
    config = SpectralConfig(scale=0.1, spectrum=1.0, structure=0.0)
    assert (spectral.amplitude_loss(guided(x, r, 1.0, config), r) < spectral.amplitude_loss(x, r)).all()
    for scale in (0.5, 1.0):
        config = SpectralConfig(scale=scale, spectrum=0.0, structure=1.0)
        assert (spectral.structure_loss(guided(x, r, 1.0, config), r) < spectral.structure_loss(x, r)).all()


def test_by_hand():
    x, r = draw(1, 2, 6, 6).float(), draw(1, 2, 6, 6, seed=1).float()
    got = guided(x, r, 1.0, SpectralConfig(0.3, 2.0, 0.7))
    expected = x - 0.3 * (2 * spectral.amplitude_gradient(x, r) + 0.7 * spectral.structure_gradient(x, r))
    torch.testing.assert_close(got, expected)


def test_the_size_of_the_gradient_does_not_depend_on_the_pictures():
    """At each frequency at most 1, so its root mean square too."""
    for side in (8, 64):
        x, r = draw(1, 1, side, side), 3 * draw(1, 1, side, side, seed=1)
        assert 0.1 < float(spectral.amplitude_gradient(x, r).square().mean().sqrt()) < 1


def test_nothing_is_guided_outside_the_range_or_at_scale_0():
    x, r = draw(1, 2, 6, 6), draw(1, 2, 6, 6, seed=1)
    for config in (SpectralConfig(scale=0.0), SpectralConfig(first=0.5), SpectralConfig(last=2.0)):
        assert guided(x, r, 1.0, config) is x
    assert not torch.equal(guided(x, r, 1.0, SpectralConfig(first=1.0, last=1.0)), x)


def test_one_reference_serves_a_batch_and_eight_equal_eight_times_one():
    x, r = draw(8, 2, 6, 6).float(), draw(1, 2, 6, 6, seed=1).float()
    singly = [guided(x[i : i + 1], r, 1.0, SpectralConfig()) for i in range(8)]
    torch.testing.assert_close(guided(x, r, 1.0, SpectralConfig()), torch.cat(singly))
    assert guided(x.half(), r, 1.0, SpectralConfig()).dtype == torch.float16


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="size that is sampled"):
        guided(draw(2, 2, 6, 6), draw(1, 2, 6, 5), 1.0, SpectralConfig())
    for name in ("scale", "spectrum", "structure"):
        for value in (-1.0, math.nan, 101.0):
            with pytest.raises(ValueError, match=name):
                SpectralConfig(**{name: value})
    with pytest.raises(ValueError, match="range"):
        SpectralConfig(first=1.0, last=2.0)
