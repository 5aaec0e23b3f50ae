"""The norm test on gradients whose mean and noise are known."""

from __future__ import annotations

import pytest
import torch

from retort.trainers.objectives.parts.batch_growth import GradientNoise, gradient_noise, next_accumulation


def _measured(gradients: torch.Tensor) -> GradientNoise:
    return gradient_noise(gradients.square().sum(1).tolist(), float(gradients.sum(0).square().sum()))


def test_both_estimates_are_unbiased():
    g = torch.Generator().manual_seed(0)
    mean = torch.full((50,), 0.2, dtype=torch.float64)
    runs = [_measured(mean + torch.randn(8, 50, generator=g, dtype=torch.float64)) for _ in range(4000)]
    assert sum(r.variance for r in runs) / 4000 == pytest.approx(50.0, rel=5e-3)
    assert sum(r.mean_square for r in runs) / 4000 == pytest.approx(2.0, rel=5e-2)


def test_debiasing_finds_the_count_that_the_papers_test_misses():
    # Var = 100 eta^2 |mean|^2 with eta 1: the count should be 100. 64 samples are taken.
    g = torch.Generator().manual_seed(1)
    mean = torch.zeros(4000, dtype=torch.float64)
    mean[0] = 1.0
    sums = torch.zeros(2, dtype=torch.float64)
    for _ in range(100):
        samples = mean + torch.randn(64, 4000, generator=g, dtype=torch.float64) * (100 / 4000) ** 0.5
        sums += torch.tensor(_measured(samples), dtype=torch.float64) / 100
    noise = GradientNoise(*sums.tolist())
    biased = noise._replace(mean_square=noise.mean_square + noise.variance / 64)
    assert next_accumulation(biased, 1, 1.0, 10_000) in (39, 40)  # ceil(100 / (1 + 100 / 64)) is 39.02, and its scatter
    assert next_accumulation(noise, 1, 1.0, 10_000) == pytest.approx(100, abs=5)


def test_the_count_grows_with_the_noise_and_never_shrinks():
    counts = [next_accumulation(GradientNoise(v, 1.0), 4, 0.5, 32) for v in (0.0, 0.5, 1.0, 1.01, 2.0, 7.9, 50.0)]
    assert counts == [4, 4, 4, 5, 8, 32, 32]
    assert next_accumulation(GradientNoise(1.0, -0.1), 4, 0.5, 32) == 32
    assert next_accumulation(GradientNoise(1.0, 100.0), 40, 0.5, 32) == 40


def test_equal_gradients_have_no_noise():
    noise = _measured(torch.full((5, 7), 0.1, dtype=torch.float64))
    assert noise.variance == pytest.approx(0.0, abs=1e-15) and noise.mean_square == pytest.approx(0.07)
    assert next_accumulation(GradientNoise(0.0, 0.0), 3, 0.1, 64) == 3


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="squared_norms"):
        gradient_noise([1.0], 1.0)
    for field, args in {"count": (0, 1.0, 4), "eta": (1, 0.0, 4), "cap": (1, 1.0, 0)}.items():
        with pytest.raises(ValueError, match=field):
            next_accumulation(GradientNoise(1.0, 1.0), *args)
