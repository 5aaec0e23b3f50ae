"""Gaussian teleportation: the formula against the ODE that it solves, its forms, its files, and the inferred mean."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate

from retort.sampling.grids import simple
from retort.sampling.path import FLOW, VE, VP, NoisePath
from retort.sampling.schedule import DiscreteSchedule, FlowSchedule
from retort.sampling.standard import SamplingDiverged
from retort.sampling.teleport import (
    LowRank,
    Stationary,
    Teleport,
    inferred_mean,
    low_rank,
    read,
    stationary,
    teleport,
)

PATHS = [VE, FLOW, VP, NoisePath("FLOW", 8.0)]
TOP = {"VE": 14.0, "FLOW": 1.0, "VP": 14.0}
SHAPE = (2, 3, 4)  # of one latent, N = 24
N = math.prod(SHAPE)


def ab(path, sigma):
    """(a, b) of x = a x0 + b n, written again."""
    if path.kind == "VE":
        return 1.0, sigma
    if path.kind == "FLOW":
        return 1 - sigma, sigma * path.noise_scale
    return 1 / math.sqrt(1 + sigma**2), sigma / math.sqrt(1 + sigma**2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def a_low_rank(rank=5, rest=0.3, seed=0, shape=SHAPE):
    g, n = generator(seed), math.prod(shape)
    q, _ = torch.linalg.qr(torch.randn(n, rank, generator=g, dtype=torch.float64))
    values = torch.rand(rank, generator=g, dtype=torch.float64) * 4 + 0.5
    mean = torch.randn(shape, generator=g, dtype=torch.float64)
    return LowRank(mean, q.T.contiguous(), values, rest)


def a_stationary(size=(3, 4), channels=2, seed=0):
    """A spectrum whose mirror images are conjugate, so that the latents are real."""
    g = generator(seed)
    x = torch.randn(40, channels, *size, generator=g, dtype=torch.float64)
    mixing = torch.randn(channels, channels, generator=g, dtype=torch.float64)
    x = torch.einsum("cd,nd...->nc...", mixing, x) + 0.8 * x.roll(1, -1)
    return stationary(x)


def dense(statistics, shape=SHAPE):
    """(mu, Sigma) of statistics, as one vector and one matrix."""
    n = math.prod(shape)
    unit = torch.eye(n, dtype=torch.float64).view(n, *shape)
    sigma = statistics.applied(lambda v: v, unit).reshape(n, n)
    return statistics.mean_of((1, *shape)).expand(shape).flatten(), sigma


def posterior_mean(mu, sigma_matrix, path, x, level):
    a, b = ab(path, level)
    middle = a**2 * sigma_matrix + b**2 * torch.eye(len(mu), dtype=torch.float64)
    return mu + a * (x - a * mu) @ torch.linalg.solve(middle, sigma_matrix)


def by_ode(mu, sigma_matrix, path, x, start, end):
    """x carried by DOP853 along dx/dsigma = (x - D)/sigma; on VP in VE's coordinates."""
    scale = (lambda s: math.sqrt(1 + s * s)) if path.kind == "VP" else (lambda s: 1.0)

    def slope(s, y):
        y = torch.from_numpy(y).view(x.shape)
        return ((y - posterior_mean(mu, sigma_matrix, path, y / scale(s), s)) / s).flatten().numpy()

    start_y = (x * scale(start)).flatten().numpy()
    done = integrate.solve_ivp(slope, (start, end), start_y, "DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    return torch.from_numpy(done).view(x.shape) / scale(end)


FORMS = {
    "low rank": lambda: a_low_rank(),
    "low rank, no rest": lambda: a_low_rank(rest=0.0),
    "stationary": lambda: a_stationary(),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMS)
def test_i_it_is_the_flow_of_a_gaussian_model(path, form, noise):
    statistics = FORMS[form]()
    mu, matrix = dense(statistics)
    x = TOP[path.kind] * noise((3, *SHAPE), dtype=torch.float64)
    for end in (0.5 * TOP[path.kind], 0.05):
        exact = by_ode(mu, matrix, path, x.flatten(1), TOP[path.kind], end).view(x.shape)
        got = teleport(x, statistics, path, TOP[path.kind], end)
        torch.testing.assert_close(got, exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMS)
def test_ii_two_jumps_are_one(path, form, noise):
    statistics, x = FORMS[form](), noise((3, *SHAPE), dtype=torch.float64)
    top = TOP[path.kind]
    one = teleport(x, statistics, path, top, 0.1)
    two = teleport(teleport(x, statistics, path, top, 0.4), statistics, path, 0.4, 0.1)
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)
    back = teleport(one, statistics, path, 0.1, top)
    torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMS)
def test_iii_to_the_same_level_is_the_identity(path, form, noise):
    x = noise((3, *SHAPE), dtype=torch.float64)
    torch.testing.assert_close(
        teleport(x, FORMS[form](), path, 0.7, 0.7, noise(SHAPE, 5, torch.float64)), x, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", ["low rank", "stationary"])
def test_iv_noise_at_the_top_becomes_the_data(path, form):
    """The map is linear, so its moments are exact: (A mu_T + c, A Sigma_T A^T) against (mu, Sigma)."""
    statistics = FORMS[form]()
    mu, matrix = dense(statistics)
    a, b = ab(path, TOP[path.kind])
    unit = torch.eye(N, dtype=torch.float64).view(N, *SHAPE)
    shift = teleport(torch.zeros_like(unit), statistics, path, TOP[path.kind], 0.0)[:1].flatten()
    linear = teleport(unit, statistics, path, TOP[path.kind], 0.0).reshape(N, N) - shift
    torch.testing.assert_close(a * mu @ linear + shift, mu, rtol=1e-8, atol=1e-8)
    covariance = linear.T @ (a**2 * matrix + b**2 * torch.eye(N, dtype=torch.float64)) @ linear
    torch.testing.assert_close(covariance, matrix, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_v_low_rank_dense_and_fourier_forms_are_one(path, noise):
    spectral = a_stationary()
    mu, matrix = dense(spectral)
    values, vectors = torch.linalg.eigh(matrix)
    full = LowRank(mu.view(SHAPE), vectors.T.contiguous(), values.clamp(min=0), 0.0)
    x = TOP[path.kind] * noise((3, *SHAPE), dtype=torch.float64)
    (a, b), (a_next, b_next) = ab(path, TOP[path.kind]), ab(path, 0.2)
    unit = torch.eye(N, dtype=torch.float64)

    def root(m):
        w, v = torch.linalg.eigh(m)
        return (v * w.clamp(min=0).sqrt()) @ v.T

    by_matrix = root(a_next**2 * matrix + b_next**2 * unit) @ torch.linalg.inv(root(a**2 * matrix + b**2 * unit))
    expected = (a_next * mu + (x.flatten(1) - a * mu) @ by_matrix.T).view(x.shape)
    for statistics in (spectral, full):
        got = teleport(x, statistics, path, TOP[path.kind], 0.2)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    # The isotropic rest is as good as eigenvectors that span it.
    short = a_low_rank(rank=5, rest=0.3)
    whole, _ = torch.linalg.qr(torch.cat([short.vectors.T, torch.randn(N, N - 5, generator=generator(9)).double()], 1))
    long = LowRank(short.mean, whole.T.contiguous(), torch.cat([short.values, torch.full((N - 5,), 0.3).double()]), 0.0)
    got, expected = (teleport(x, statistics, path, TOP[path.kind], 0.2) for statistics in (short, long))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", FORMS)
def test_vi_the_planted_mean_is_inferred_from_one_call(path, form, noise):
    statistics = FORMS[form]()
    _, matrix = dense(statistics)
    planted = 2 * noise((3, *SHAPE), 4, torch.float64)
    for level in (TOP[path.kind], 0.4 * TOP[path.kind]):
        x = TOP[path.kind] * noise((3, *SHAPE), 5, torch.float64)
        x0 = torch.stack(
            [posterior_mean(m.flatten(), matrix, path, row.flatten()[None], level)[0].view(SHAPE)
             for m, row in zip(planted, x, strict=True)]
        )  # fmt: skip
        torch.testing.assert_close(inferred_mean(statistics, path, x, x0, level), planted, rtol=1e-9, atol=1e-9)


def test_a_flow_of_pure_noise_answers_with_the_mean_itself(noise):
    x, x0 = noise((2, *SHAPE), 1), noise((2, *SHAPE), 2)
    assert torch.equal(inferred_mean(a_low_rank(), FLOW, x, x0, 1.0), x0.double())


@pytest.mark.parametrize("shape", [(3, 5, 8, 6), (3, 5, 2, 8, 6)])
def test_statistics_of_samples_are_their_mean_and_covariance(shape, noise):
    x = noise((40, *shape[1:]), 1, torch.float64) * torch.rand(shape[1:], generator=generator(2)).double() + 0.5
    whole = low_rank(x, 39)
    flat = x.flatten(1)
    mu, matrix = dense(whole, shape[1:])
    torch.testing.assert_close(mu, flat.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(matrix, torch.cov(flat.T), rtol=1e-5, atol=1e-5)
    assert whole.rest == pytest.approx(0, abs=1e-12)
    # The rest keeps the whole variance, whatever is left out.
    for rank in (1, 10, 38):
        kept = low_rank(x, rank)
        trace = float(kept.values.double().sum()) + kept.rest * (flat.shape[1] - rank)
        assert trace == pytest.approx(float(torch.cov(flat.T).trace()), rel=1e-6)
        assert kept.fits(shape) and not kept.fits((1, 5, 8, 8))
    assert len(low_rank(x).values) == 20


def test_more_latents_than_numbers():
    x = torch.randn(60, 1, 2, 3, generator=generator(1))
    kept = low_rank(x)
    torch.testing.assert_close(dense(kept, (1, 2, 3))[1], torch.cov(x.flatten(1).T).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(6, 8), (2, 6, 8)])
def test_stationary_statistics_are_those_of_all_shifts(size, noise):
    """The FFT form of samples is the plain covariance of the samples and all their circular shifts."""
    x = noise((3, 2, *size), 1, torch.float64) + 0.4
    shifts = [x]
    for dim in range(2, 2 + len(size)):
        shifts = [one.roll(k, dim) for one in shifts for k in range(x.shape[dim])]
    every = torch.cat(shifts).flatten(1)
    statistics = stationary(x)
    shape = (2, *size)
    mu, matrix = dense(statistics, shape)
    torch.testing.assert_close(mu, every.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(matrix, torch.cov(every.T, correction=0), rtol=1e-4, atol=1e-5)


def test_a_spectrum_at_another_size():
    statistics = a_stationary(size=(6, 5))
    for size in ((6, 5), (3, 7), (12, 10), (8, 1)):
        _, matrix = dense(statistics, (2, *size))
        torch.testing.assert_close(matrix, matrix.T, rtol=1e-9, atol=1e-9)
        assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-6
        assert statistics.fits((4, 2, *size)) and not statistics.fits((4, 3, *size))
    # White noise is white at every size; so is a correlation of neighbours, well within the size, the same.
    white = Stationary(torch.zeros(2), (2.5 * torch.eye(2)).expand(6, 5, 2, 2).to(torch.complex64))
    torch.testing.assert_close(dense(white, (2, 9, 4))[1], 2.5 * torch.eye(72).double(), rtol=1e-6, atol=1e-6)
    x = torch.randn(400, 1, 16, 16, generator=generator(3))
    near = stationary(x + x.roll(1, -1))
    small = dense(near, (1, 8, 8))[1]
    assert float(small[0, 0]) == pytest.approx(2, rel=0.05) and float(small[0, 1]) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_is_its_items_and_dtypes_are_kept(form, noise):
    statistics, x = FORMS[form](), noise((8, *SHAPE))
    means = noise((8, *SHAPE), 3)
    whole = teleport(x, statistics, VE, 14.0, 3.0, means)
    assert whole.dtype == x.dtype
    parts = [teleport(x[i : i + 1], statistics, VE, 14.0, 3.0, means[i : i + 1]) for i in range(8)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_what_was_written_is_read(form, noise):
    statistics = FORMS[form]()
    again = read({name: value.float() for name, value in statistics.state().items()})
    x = noise((2, *SHAPE), dtype=torch.float64)
    torch.testing.assert_close(
        teleport(x, again, VE, 9.0, 1.0), teleport(x, statistics, VE, 9.0, 1.0), rtol=1e-5, atol=1e-5
    )
    assert str(again) == str(statistics)


GOOD = {name: value.float() for name, value in a_low_rank().state().items()}
WAVES = {name: value.float() for name, value in a_stationary().state().items()}


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({}, "it holds nothing"),
        ({"weight": torch.zeros(3)}, "it holds weight"),
        (GOOD | {"extra": torch.zeros(1)}, "mean, vectors, values and rest"),
        (GOOD | {"mean": torch.zeros(2, 3)}, r"the mean has shape \(2, 3\)"),
        (GOOD | {"mean": torch.zeros(2, 3, 4, dtype=torch.int64)}, "mean is of torch.int64"),
        (GOOD | {"vectors": torch.zeros(5, 23)}, r"shape \(5, 24\), got \(5, 23\)"),
        (GOOD | {"vectors": torch.ones(5, 24)}, "not orthonormal"),
        (GOOD | {"values": GOOD["values"] * math.nan}, "values holds NaN"),
        (GOOD | {"values": -GOOD["values"]}, "a variance is negative"),
        (GOOD | {"rest": torch.zeros(2)}, "rest is one number"),
        (GOOD | {"rest": torch.tensor(-1.0)}, "a variance is negative"),
        (WAVES | {"mean": torch.zeros(3)}, r"spectrum of shape \(H, W, 3, 3\)"),
        (WAVES | {"spectrum": WAVES["spectrum"][..., :1]}, "two parts of a number"),
        (WAVES | {"spectrum": WAVES["spectrum"] * math.inf}, "spectrum holds NaN or infinity"),
        (WAVES | {"spectrum": -WAVES["spectrum"]}, "a variance is negative"),
        (WAVES | {"spectrum": torch.ones_like(WAVES["spectrum"])}, "not Hermitian"),
    ],
)
def test_tensors_of_another_origin_are_refused(state, said):
    with pytest.raises(ValueError, match=said):
        read(state)


def test_statistics_that_cannot_be_taken_are_named():
    with pytest.raises(ValueError, match="at least 2 latents and 1 arrived"):
        low_rank(torch.zeros(1, *SHAPE))
    with pytest.raises(ValueError, match="rank must be 0 to 3 with 4 latents, got 4"):
        low_rank(torch.randn(4, *SHAPE), 4)
    for fit in (low_rank, stationary):
        with pytest.raises(ValueError, match="latents holds NaN"):
            fit(torch.full((4, *SHAPE), math.nan))


GRID = torch.tensor([14.0, 9.0, 5.0, 2.0, 0.0])


def test_where_sampling_begins():
    statistics = a_low_rank()
    assert [Teleport(statistics, steps).first(GRID) for steps in (0, 1, 4, 9)] == [0, 1, 4, 4]
    levels = {20.0: 0, 14.0: 0, 9.0: 1, 8.9: 2, 0.5: 4}
    assert {s: Teleport(statistics, 3, s).first(GRID) for s in levels} == levels
    for field, bad in (("steps", -1), ("sigma", -0.5), ("sigma", math.nan)):
        with pytest.raises(ValueError, match="skip"):
            Teleport(statistics, **{field: bad})


def test_how_many_of_twenty_steps_lie_in_heavy_noise():
    """Levels whose noise is 17 times the data, by the schedule alone: what the node's page says."""
    for shift, steps in ((1.0, 1), (3.0, 3)):
        grid = simple(FlowSchedule(shift=shift), 20)
        assert sum(float(s / (1 - s)) > 16.8 for s in grid[1:]) == steps
    assert float(DiscreteSchedule().sigma_max) < 16.8 < float(DiscreteSchedule(zsnr=True).sigma_max)


def test_it_says_why_it_does_nothing():
    plan, shape = Teleport(a_low_rank(), 2), (3, *SHAPE)
    assert plan.why_not(GRID, shape, True, True, False) == ""
    assert "below the model's highest level" in plan.why_not(GRID, shape, False, True, False)
    assert "latent is not empty" in plan.why_not(GRID, shape, True, False, False)
    assert "noise mask" in plan.why_not(GRID, shape, True, True, True)
    assert "(2, 3, 5), and the statistics have 5 directions" in plan.why_not(GRID, (3, 2, 3, 5), True, True, False)
    assert "nothing to skip" in Teleport(a_low_rank(), 0).why_not(GRID, shape, True, True, False)
    anywhere = Teleport(a_stationary(), 2)
    assert anywhere.why_not(GRID, (3, 2, 30, 50), True, True, False) == ""
    assert "any size" in anywhere.why_not(GRID, (3, 4, 3, 4), True, True, False)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("infer", [True, False])
def test_the_jump_calls_the_model_once_to_infer_and_lands_on_the_flow(path, infer, noise):
    statistics = a_low_rank()
    mu, matrix = dense(statistics)
    other = mu + 1.5 if infer else mu
    calls = []

    def model(x, sigma):
        calls.append(sigma)
        return posterior_mean(other, matrix, path, x.flatten(1), float(sigma[0])).view(x.shape)

    grid = torch.tensor([TOP[path.kind], 0.6 * TOP[path.kind], 0.3 * TOP[path.kind], 0.0], dtype=torch.float64)
    x = TOP[path.kind] * noise((3, *SHAPE), dtype=torch.float64)
    got = Teleport(statistics, 2, infer=infer).jump(model, x, grid, path)
    assert len(calls) == infer and all(s.shape == (3,) for s in calls)
    exact = teleport(x, statistics, path, grid[0], grid[2], other.view(SHAPE))
    torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)


def test_a_model_that_breaks_while_the_mean_is_inferred_is_named(noise):
    plan, x = Teleport(a_low_rank(), 2), noise((1, *SHAPE))
    with pytest.raises(SamplingDiverged, match="model returned NaN or infinity in step 1 of 4"):
        plan.jump(lambda x, sigma: x * math.nan, x, GRID, VE)
    with pytest.raises(SamplingDiverged, match="already holds NaN"):
        plan.jump(lambda x, sigma: x, x * math.nan, GRID, VE)
