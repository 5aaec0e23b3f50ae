"""Packed latents of several parts: ComfyUI's packing, losses of each part, a carried part at its own level."""

from __future__ import annotations

import pytest
import torch

from retort.sampling.levels import Parametrisation
from retort.sampling.parts import Parts, own_level, parts_of
from retort.sampling.path import FLOW, VE

SHAPES = ((3, 2, 4, 4), (2, 5))
H3 = (12.0, 3.0)


def latents(count=2, batch=3):
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(batch, *shape, generator=generator) for shape in SHAPES] for _ in range(count)]


def mean_each(x):
    return x.flatten(1).mean(1)


def test_packing_is_undone_and_one_tensor_stays_as_it_is():
    ((video, sound),) = latents(1)
    parts = Parts.of([video, sound])
    packed = parts.pack([video, sound])
    assert parts.shapes == SHAPES and packed.shape == (3, 1, 96 + 10)
    assert all(torch.equal(a, b) for a, b in zip(parts.unpack(packed), (video, sound), strict=True))
    assert torch.equal(parts.first(packed), video)
    assert Parts.of([video]).pack([video]) is video and Parts().unpack(video) == [video]
    assert parts_of(video) == (video,)


def test_a_loss_is_the_mean_over_each_part_times_its_weight():
    (video, sound), (other, heard) = latents()
    parts = Parts(SHAPES, (1.0, 0.25))
    x, y = parts.pack([video, sound]), parts.pack([other, heard])
    found = parts.sum(lambda gain, a, b: mean_each((a - b).square()), x, y)
    assert torch.allclose(found, mean_each((video - other).square()) + 0.25 * mean_each((sound - heard).square()))


@pytest.mark.parametrize("which", [0, 1])
def test_with_weight_zero_the_other_part_learns_as_it_would_alone(which):
    """Value and gradient to the bit, and none to the part that is left out."""
    (mine, other), weights = latents(), (1.0, 0.0) if which == 0 else (0.0, 1.0)
    parts = Parts(SHAPES, weights)
    x = parts.pack(mine).requires_grad_()
    each = parts.sum(lambda gain, a, b: mean_each((a - b).square()), x, parts.pack(other))
    each.mean().backward()
    alone = mine[which].clone().requires_grad_()
    expected = mean_each((alone - other[which]).square())
    expected.mean().backward()
    found = parts.unpack(x.grad)
    assert torch.equal(each, expected) and torch.equal(found[which], alone.grad)
    assert not found[1 - which].any()


def test_no_weight_at_all_is_an_error():
    with pytest.raises(ValueError, match="weight 0"):
        Parts(SHAPES, (0.0, 0.0)).sum(lambda gain, a: mean_each(a), Parts(SHAPES).pack(latents(1)[0]))


def test_a_part_that_is_carried_larger_has_the_level_of_its_own_shift():
    """MiniMax-H3: the same base grid t, video shifted by 12 and sound by 3; carried at g = 12 / 3."""
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    video, sound = (shift * t / (1 + (shift - 1) * t) for shift in H3)
    assert torch.allclose(own_level(video, H3[0] / H3[1]), sound)
    assert own_level(video, 1.0) is video


def test_carried_and_own_are_one_latent():
    """(1 - s) g x0 + s n is the part's own noisy latent at its own level, times s / s'."""
    x0, noise, sigma = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.tensor([0.2, 0.7, 1.0])
    gain, own = 4.0, own_level(sigma, 4.0)
    carried, plain = FLOW.add_noise(gain * x0, sigma, noise), FLOW.add_noise(x0, own, noise)
    assert torch.allclose(carried, plain * (sigma / own).view(-1, 1, 1), atol=1e-6)


def test_errors_are_scaled_to_the_networks_own_output():
    """A velocity that is wrong by e at the part's own level is wrong by g s' e in the carried x0."""
    parts = Parts(SHAPES, gains=(1.0, 4.0))
    sigma = torch.tensor([0.3, 0.6, 0.9])
    ((video, sound),) = latents(1)
    own = own_level(sigma, 4.0)
    wrong = parts.pack([video * sigma.view(-1, 1, 1, 1, 1), 4 * sound * own.view(-1, 1, 1)])
    scale = Parametrisation("flow", FLOW).scale
    found = parts.unpack(parts.scaled(scale, sigma, wrong))
    assert torch.allclose(found[0], video) and torch.allclose(found[1], sound, atol=1e-6)
    assert torch.equal(parts.unpack(parts.own(wrong))[1], parts.unpack(wrong)[1] / 4)


@pytest.mark.parametrize(("path", "prediction"), [(FLOW, "flow"), (VE, "eps"), (VE, "v")])
def test_one_tensor_is_scaled_as_ever(path, prediction):
    sigma, error = torch.tensor([0.3, 0.6, 0.9]), torch.randn(3, 4, 5)
    scale = Parametrisation(prediction, path).scale
    assert torch.equal(Parts().scaled(scale, sigma, error), error / scale(sigma).view(-1, 1, 1))
    assert Parts().own(error) is error
