"""Steps to branch at: standard's samplers bit for bit, exact marginals, the SDE's small-step limit, mixed levels."""

from __future__ import annotations

import pytest
import torch

from retort.sampling.path import FLOW, VE, VP, NoisePath
from retort.sampling.standard import SAMPLERS
from retort.sampling.transition import Transition

PATHS = [VE, FLOW, VP, NoisePath("FLOW", 8.0)]
SHAPE = (3, 4, 5, 6)


def chain(transition, model, x, sigmas, path, fresh):
    for i in range(len(sigmas) - 1):
        here, there = (sigmas[j].expand(len(x)) for j in (i, i + 1))
        x = transition.step(path, x, model(x, here), here, there, fresh[i] if transition.stochastic else None)
    return x


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("kind", "name"), [("ancestral", "euler_ancestral"), ("ode", "euler")])
def test_it_is_the_standard_sampler(kind, name, path, gaussian, noise):
    sigmas = torch.tensor([1.0, 0.83, 0.5, 0.21, 0.0])
    fresh = [noise(SHAPE, 10 + i) for i in range(4)]
    stream = iter(fresh)
    options = {"noise_sampler": lambda *_: next(stream)} if kind == "ancestral" else {}
    expected = SAMPLERS[name](gaussian(path), noise(SHAPE), sigmas, disable=True, path=path, **options)
    got = chain(Transition(kind), gaussian(path), noise(SHAPE), sigmas, path, fresh)
    if path.kind == "VP":
        torch.testing.assert_close(got, expected)
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("path", PATHS)
def test_ancestral_steps_keep_the_marginal_of_a_single_datum(path, gaussian, noise):
    shape = (4, 4, 64, 64)
    mu, fresh = torch.full(shape, 0.4), [noise(shape, 2), noise(shape, 3)]
    x = path.add_noise(mu, 0.9, noise(shape, 1))
    out = chain(Transition(), gaussian(path, S=0.0), x, torch.tensor([0.9, 0.6, 0.3]), path, fresh)
    unit = path.noise_from(out, mu, 0.3)
    assert float(unit.mean()) == pytest.approx(0, abs=0.02)
    assert float(unit.std()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("path", [FLOW, NoisePath("FLOW", 8.0)])
@pytest.mark.parametrize("noise_level", [0.3, 0.7])
def test_the_sde_has_the_odes_marginals_as_steps_get_small(path, noise_level, gaussian, noise):
    """Closed form: each step is affine in x, so mean and variance go through it exactly."""
    model, transition = gaussian(path, mu=0.4, S=0.7), Transition("sde", noise_level)

    def moments(steps):
        sigmas = torch.linspace(0.95, 0.05, steps + 1, dtype=torch.float64)
        a, b = 1 - sigmas, sigmas * path.noise_scale
        mean, variance = a[0] * model.mu, a[0] ** 2 * model.S**2 + b[0] ** 2
        # Three probes tell offset, slope and the noise's factor of the affine map.
        probe, unit = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 0.0, 1.0]).double()
        for i in range(steps):
            here, there = sigmas[i].expand(3), sigmas[i + 1].expand(3)
            x = probe.view(3, 1)
            y = transition.step(path, x, model(x, here), here, there, unit.view(3, 1)).view(3)
            slope, up = y[1] - y[0], y[2] - y[0]
            mean, variance = slope * mean + y[0], slope**2 * variance + up**2
        return mean - a[-1] * model.mu, variance.sqrt() - (a[-1] ** 2 * model.S**2 + b[-1] ** 2).sqrt()

    (mean, coarse), (mean_fine, fine) = moments(200), moments(400)
    assert max(abs(mean), abs(mean_fine)) < 1e-9 * path.noise_scale  # exact: the mean does not see the noise
    assert abs(fine) < 0.02 * path.noise_scale
    assert float(coarse / fine) == pytest.approx(2, abs=0.3)  # first order


def test_the_sde_starts_from_pure_noise_and_ends_in_x0(gaussian, noise):
    sigmas = torch.tensor([1.0, 0.6, 0.0])
    x, model = noise(SHAPE), gaussian(FLOW)
    here, there = sigmas[0].expand(3), sigmas[1].expand(3)
    out = Transition("sde").step(FLOW, x, model(x, here), here, there, noise(SHAPE, 1))
    # sigma / (1 - sigma) with the second level in the denominator: 0.49 / 0.4 * dt.
    still = Transition("sde").step(FLOW, x, model(x, here), here, there, torch.zeros(SHAPE))
    assert torch.isfinite(out).all()
    assert float((out - still).std()) == pytest.approx((0.49 / 0.4 * 0.4) ** 0.5, abs=0.05)
    x0 = model(out, there)
    assert torch.equal(Transition("sde").step(FLOW, out, x0, there, sigmas[2].expand(3), noise(SHAPE)), x0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["ancestral", "sde", "ode"])
def test_levels_may_differ_in_a_batch(kind, path, gaussian, noise):
    if kind == "sde" and path.kind != "FLOW":
        pytest.skip("a step of flow models")
    here, there = torch.tensor([1.0, 0.5, 0.2]), torch.tensor([0.7, 0.2, 0.0])
    x, x0, fresh = noise(SHAPE), noise(SHAPE, 1), noise(SHAPE, 2)
    together = Transition(kind).step(path, x, x0, here, there, fresh)
    for k in range(3):
        row = slice(k, k + 1)
        alone = Transition(kind).step(path, x[row], x0[row], here[row], there[row], fresh[row])
        assert torch.equal(together[row], alone)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["ancestral", "sde"])
def test_the_law_is_what_the_step_draws_from(kind, path, noise):
    if kind == "sde" and path.kind != "FLOW":
        pytest.skip("a step of flow models")
    here, there = torch.tensor([0.9, 0.5, 0.2]), torch.tensor([0.7, 0.2, 0.0])
    x, x0, fresh = (noise(SHAPE, i).double() for i in range(3))
    mean, std = Transition(kind).moments(path, x, x0, here, there)
    assert std.shape == (3, 1, 1, 1)
    assert torch.allclose(mean + std * fresh, Transition(kind).step(path, x, x0, here, there, fresh), atol=1e-9)
    assert std[2] == 0 and torch.equal(mean[2], x0[2]) and float(std[:2].min()) > 0


def test_the_law_of_the_sde_is_the_papers(noise):
    # Flow-GRPO: mean = x (1 + s^2 / (2 t) dt) + v (1 + s^2 (1 - t) / (2 t)) dt, std = s sqrt(-dt),
    # s = a sqrt(t / (1 - t)).
    t, dt, a = 0.6, -0.15, 0.7
    x, v = noise(SHAPE).double(), noise(SHAPE, 1).double()
    s = a * (t / (1 - t)) ** 0.5
    levels = (torch.full((3,), u, dtype=torch.float64) for u in (t, t + dt))
    mean, std = Transition("sde", a).moments(FLOW, x, x - t * v, *levels)
    expected = x * (1 + s**2 / (2 * t) * dt) + v * (1 + s**2 * (1 - t) / (2 * t)) * dt
    assert torch.allclose(mean, expected, rtol=1e-12)
    assert torch.allclose(std, torch.full_like(std, s * (-dt) ** 0.5), rtol=1e-12)


def test_errors_teach():
    with pytest.raises(ValueError, match="kind 'ddim' is not known; use one of ancestral, sde, ode"):
        Transition("ddim")
    with pytest.raises(ValueError, match="noise_level must be a positive number, got 0"):
        Transition("sde", 0)
    with pytest.raises(ValueError, match="is a step of flow models .* choose 'ancestral'"):
        Transition("sde").check(VE)
    x = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="needs the noise"):
        Transition().step(VE, x, x, torch.ones(1), torch.zeros(1))
    assert Transition().stochastic and not Transition("ode").stochastic
