"""Student-t noise against its exact laws, and a flow that keeps the quantiles of a Student-t mixture."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from retort.sampling.path import FLOW, VE, VP
from retort.sampling.standard import SAMPLERS
from retort.sampling.student_t import check_aug_dim, quantiles, student_t


@pytest.mark.parametrize(("numbers", "dim"), [(16, 3.0), (256, 64.0), (512, 8.0)])
def test_the_mean_square_has_the_f_distribution(noise, numbers, dim):
    n = student_t(noise((4000, numbers), dtype=torch.float64), quantiles(3, range(4000)), dim)
    squares = n.square().mean(1).numpy()
    assert stats.kstest(squares, stats.f(numbers, dim).cdf).pvalue > 0.01
    # The direction stays that of the Gaussian noise: one coordinate is Student-t.
    assert stats.kstest(n[:, 0].numpy(), stats.t(dim).cdf).pvalue > 0.01


def test_infinity_is_the_gaussian_noise_itself_and_a_large_d_nearly(noise):
    z, q = noise((6, 4, 8, 8)), quantiles(1, range(6))
    assert student_t(z, q, math.inf) is z and student_t(z, q, 0) is z
    torch.testing.assert_close(student_t(z, q, 1e12), z, rtol=1e-5, atol=0)
    assert not torch.allclose(student_t(z, q, 64.0), z, rtol=1e-2)


def test_one_radius_to_a_sample_images_and_video(noise):
    for shape in ((3, 4, 8, 8), (3, 4, 2, 8, 8), (3, 1, 77)):
        z = noise(shape)
        ratio = (student_t(z, quantiles(1, range(3)), 5.0) / z).flatten(1)
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
        assert len(set(ratio[:, 0].tolist())) == 3


def test_a_quantile_belongs_to_its_item_and_seed():
    whole = quantiles(7, range(8))
    assert torch.equal(torch.cat([quantiles(7, [i]) for i in range(8)]), whole)
    assert torch.equal(quantiles(7, [5, 2]), whole[[5, 2]])
    assert not torch.equal(quantiles(8, range(8)), whole)
    assert whole.dtype == torch.float64 and bool((whole > 0).all() & (whole < 1).all())


def test_no_quantile_is_clipped(noise):
    """At N = 16384 and D = 8 the released code's bound on the Beta variable cuts typical samples."""
    z = noise((2, 16384), dtype=torch.float64)
    q = torch.tensor([1e-6, 1 - 1e-6], dtype=torch.float64)
    scale = (student_t(z, q, 8.0) / z)[:, 0].numpy()
    np.testing.assert_allclose(scale, np.sqrt(8 / stats.chi2(8).ppf(q.numpy())), rtol=1e-9)


@pytest.mark.parametrize("path", [VE, FLOW, VP])
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m"])
def test_with_a_single_datum_every_solver_follows_the_straight_line(noise, path, name):
    """x(sigma) = y + (x_T - y) sigma / sigma_T, whatever the noise; on VP in VE's coordinates."""
    y = noise((3, 4, 5, 5), 1, torch.float64)
    n = student_t(noise((3, 4, 5, 5), 2, torch.float64), quantiles(2, range(3)), 4.0)
    sigmas = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
    x = path.add_noise(y, sigmas[0], n)
    out = SAMPLERS[name](lambda x, sigma: y, x, sigmas, disable=True, path=path)
    torch.testing.assert_close(out, path.add_noise(y, sigmas[-1], n), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dim", [3.0, 128.0])
def test_the_flow_of_two_points_keeps_the_quantile_of_their_student_t_mixture(dim):
    """One dimension: posterior weights ~ pi_i ((x - y_i)^2 + r^2)^(-(1 + D) / 2), dx/dsigma = (x - x0) / sigma."""
    points, shares = np.array([-1.0, 0.5]), np.array([0.3, 0.7])

    def slope(sigma, x):
        logs = np.log(shares) - (1 + dim) / 2 * np.log((x - points) ** 2 + sigma**2 * dim)
        weights = np.exp(logs - logs.max())
        return (x - (weights * points).sum() / weights.sum()) / sigma

    def cdf(x, sigma):
        return float((shares * stats.t(dim, loc=points, scale=sigma).cdf(x)).sum())

    for start in (-9.0, 2.0, 20.0):
        done = integrate.solve_ivp(slope, (10.0, 0.4), [start], "DOP853", rtol=1e-12, atol=1e-12)
        assert cdf(done.y[0, -1], 0.4) == pytest.approx(cdf(start, 10.0), abs=1e-9)


@pytest.mark.parametrize("bad", [-1.0, 1.0, 2.0, 1e13, math.nan, -math.inf])
def test_a_d_without_variance_is_refused(bad):
    with pytest.raises(ValueError, match="aug_dim must be 0 .* or 2 to 1e12, got"):
        check_aug_dim(bad)
    for good in (0, 2.5, 1e12, math.inf):
        check_aug_dim(good)
