"""Reflection on two Gaussians on a line (W2SD, arXiv 2502.00473): known mode masses, order, identities and cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import torch

from retort.sampling.path import FLOW, VE, VP, NoisePath
from retort.sampling.reflection import BASES, INVERSIONS, ReflectionConfig, sample_reflection
from retort.sampling.standard import SAMPLERS

STRONG, WEAK = (0.25, 0.75), (0.05, 0.95)
COUNT = 2_000
PATHS = [VE, FLOW, VP]


def both(path, sigma):
    """(a, b) of x = a x0 + b n at the level that has this ratio b / a."""
    if path.kind == "VE":
        return torch.ones_like(sigma), sigma
    if path.kind == "FLOW":
        return 1 - sigma, sigma * path.noise_scale
    return 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()


@dataclass
class Modes:
    """The posterior mean for data at -4 and +4 with spread 0.5, latents (B, 1, 1, 1); records (level, batch)."""

    weights: tuple[float, float]
    path: NoisePath = VE
    calls: list = field(default_factory=list)

    def __call__(self, x, sigma, **extra_args):
        assert sigma.shape == (len(x),)
        self.calls.append(float(sigma[0]))
        mu, w = torch.tensor([-4.0, 4.0], dtype=x.dtype), torch.tensor(self.weights, dtype=x.dtype)
        a, b = (c.view(-1, 1) for c in both(self.path, sigma.to(x)))
        flat, wide = x.reshape(len(x), -1)[:, :1], a**2 * 0.25 + b**2
        mode = torch.softmax(w.log() - 0.5 * (flat - a * mu) ** 2 / wide, 1)
        mean = (mode * (mu + a * 0.25 / wide * (flat - a * mu))).sum(1)
        return mean.view(-1, *(1,) * (x.ndim - 1)).expand_as(x).clone()


def grid(path, steps):
    """Karras' levels from 20 to 0.02 (rho 7), as the path counts them."""
    high, low = 20 ** (1 / 7), 0.02 ** (1 / 7)
    sigma = (high + torch.linspace(0, 1, steps + 1, dtype=torch.float64) * (low - high)) ** 7
    return sigma / (1 + sigma) if path.kind == "FLOW" else sigma


def start(path, sigma, count=COUNT):
    """Quantiles of the strong mixture's own noised law, which have no sampling error; left-mode ones first."""
    lower = round(STRONG[0] * count)
    mu = torch.cat([torch.full((lower,), -4.0), torch.full((count - lower,), 4.0)]).double()
    unit = torch.cat([torch.special.ndtri((torch.arange(n).double() + 0.5) / n) for n in (lower, count - lower)])
    a, b = both(path, sigma)
    return (a * mu + (a**2 * 0.25 + b**2).sqrt() * unit).view(-1, 1, 1, 1)


def sampled(path, strong, weak, steps=100, count=COUNT, **config):
    sigmas = grid(path, steps)
    x = start(path, sigmas[0], count)
    return sample_reflection(
        Modes(strong, path), x, sigmas, disable=True, path=path, weak=Modes(weak, path),
        config=ReflectionConfig(**config),
    )  # fmt: skip


def left(x):
    return float((x < 0).double().mean())


PLAIN = {"begin": 0.0, "end": 0.0}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("strong", "weak", "config", "mass", "within"),
    [
        (STRONG, WEAK, {}, 0.425, 0.015),
        (STRONG, WEAK, {"end": 0.5}, 0.425, 0.015),
        (STRONG, WEAK, {"begin": 0.5}, 0.25, 0.01),
        (STRONG, STRONG, {"inversion": "fixed_point"}, 0.25, 0.01),
        (WEAK, STRONG, {}, 0.005, 0.005),
        (STRONG, WEAK, {"inversion": "fixed_point"}, 0.425, 0.015),
        (STRONG, WEAK, {"inversion": "midpoint"}, 0.425, 0.015),
        (STRONG, WEAK, {"inversion": "fixed_point", "base": "heun"}, 0.425, 0.015),
        (STRONG, WEAK, {"inversion": "fixed_point", "base": "dpmpp_2m"}, 0.425, 0.015),
        (STRONG, WEAK, PLAIN, 0.25, 0.01),
    ],
    ids=["all", "first half", "last half", "no gap", "reversed", "fixed", "midpoint", "heun", "2m", "plain"],
)
def test_mass_moves_to_where_the_weak_model_has_too_little(path, strong, weak, config, mass, within):
    assert left(sampled(path, strong, weak, **config)) == pytest.approx(mass, abs=within)


def test_more_rounds_go_on_in_the_same_direction():
    masses = [left(sampled(VE, STRONG, WEAK, rounds=rounds, end=0.5)) for rounds in (1, 2, 3)]
    assert masses[0] + 0.1 < masses[1] and masses[1] + 0.05 < masses[2]


def test_the_ode_of_twice_strong_less_weak_is_the_limit():
    sigmas = grid(VE, 100)
    strong, weak = Modes(STRONG), Modes(WEAK)
    x = start(VE, sigmas[0])
    field_ = SAMPLERS["heun"](lambda y, s, **_: 2 * strong(y, s) - weak(y, s), x, sigmas, disable=True)
    reflected = sampled(VE, STRONG, WEAK, steps=100, inversion="fixed_point", base="heun")
    assert left(field_) == pytest.approx(0.425, abs=0.01) and left(reflected) == pytest.approx(left(field_), abs=0.005)
    assert float(field_[field_ > 0].std()) == pytest.approx(0.476, abs=0.01)


def reflection_of(path, x, sigma, below, strong=STRONG, weak=WEAK, **config):
    """x~: what the callback sees before the step, and the residuals that were told."""
    seen, told = [], []
    sample_reflection(
        Modes(strong, path), x, torch.tensor([sigma, below], dtype=x.dtype), None, seen.append, True, path=path,
        weak=Modes(weak, path), config=ReflectionConfig(**config), inverted=lambda step, r: told.append((step, r)),
    )  # fmt: skip
    return seen[0]["x"], told


def test_the_local_error_is_of_second_order():
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64).view(-1, 1, 1, 1)
    sigma = torch.full((len(x),), 2.0, dtype=torch.float64)
    # sigma h (score_s - score_w), since score = (x0 - x) / sigma^2.
    slope = (Modes(STRONG)(x, sigma) - Modes(WEAK)(x, sigma)) / 2.0
    moved = [reflection_of(VE, x, 2.0, 2.0 - h)[0] - x for h in (0.2, 0.1, 0.05, 0.025)]
    errors = [float((m - h * slope).abs().max()) for m, h in zip(moved, (0.2, 0.1, 0.05, 0.025), strict=True)]
    for error, known in zip(errors, (0.154, 0.0371, 0.0091, 0.0022), strict=True):
        assert error == pytest.approx(known, abs=6e-5 if known < 0.1 else 6e-4)
    assert float(moved[2].abs().max() / moved[3].abs().max()) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("inversion", INVERSIONS)
def test_every_inversion_is_the_theorem_to_first_order(path, inversion):
    x = torch.linspace(-3, 3, 401, dtype=torch.float64).view(-1, 1, 1, 1)
    level = 0.6 if path.kind == "FLOW" else 2.0
    s = torch.full((len(x),), level, dtype=torch.float64)
    slope = (Modes(STRONG, path)(x, s) - Modes(WEAK, path)(x, s)) / level
    if path.kind == "VP":
        slope = slope / (1 + level**2) ** 0.5

    def error(h):
        found, _ = reflection_of(path, x, level, level - h, inversion=inversion)
        return float((found - x - h * slope).abs().max())

    h = 0.004 if path.kind == "FLOW" else 0.02
    assert math.log2(error(h) / error(h / 2)) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("path", [*PATHS, NoisePath("FLOW", 8.0)])
@pytest.mark.parametrize("base", BASES)
def test_a_pair_without_a_gap_is_the_plain_sampler(path, base):
    """At ten steps, to the solver's precision: the iteration starts at the answer."""
    sigmas = grid(path, 10)
    x, model = start(path, sigmas[0], 2000), Modes(STRONG, path)
    plain = SAMPLERS[base](model, x, sigmas, disable=True, path=path)
    told = []
    found = sample_reflection(
        model, x, sigmas, disable=True, path=path, weak=model, inverted=lambda step, r: told.append(r),
        config=ReflectionConfig(inversion="fixed_point", base=base, rounds=2),
    )  # fmt: skip
    assert float((found - plain).abs().max()) < 1e-3
    assert len(told) == 20 and float(torch.stack(told).max()) < 1e-9


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("path", PATHS)
def test_an_empty_range_is_the_plain_sampler_to_the_bit(path, base):
    sigmas = torch.cat([grid(path, 6).float(), torch.zeros(1)])
    x, model = start(path, sigmas[0].double(), 50).float(), Modes(STRONG, path)
    found = sample_reflection(
        model, x, sigmas, disable=True, path=path, weak=Modes(WEAK, path), config=ReflectionConfig(**PLAIN, base=base)
    )
    assert torch.equal(found, SAMPLERS[base](model, x, sigmas, disable=True, path=path))


def test_midpoint_halves_the_drift_of_euler_and_fixed_point_has_none():
    x = torch.linspace(2, 6, 401, dtype=torch.float64).view(-1, 1, 1, 1)
    drift = {
        inversion: float((reflection_of(VE, x, 2.0, 1.99, weak=STRONG, inversion=inversion)[0] - x).abs().max())
        for inversion in INVERSIONS
    }
    assert drift["midpoint"] == pytest.approx(drift["euler"] / 2, rel=0.02)
    assert drift["fixed_point"] < 1e-12 < 1e-6 < drift["midpoint"]


@pytest.mark.parametrize("path", PATHS)
def test_the_fixed_point_undoes_the_weak_models_step(path):
    """For a pair with a gap: a weak Euler step from x~ leads to where the strong step led, within the residual told."""
    level, below = (0.6, 0.58) if path.kind == "FLOW" else (2.0, 1.8)
    x = torch.linspace(-3, 3, 201, dtype=torch.float64).view(-1, 1, 1, 1)
    s = torch.full((len(x),), level, dtype=torch.float64)
    y = path.move(x, Modes(STRONG, path)(x, s), level, below)
    for iterations in (1, 3, 40):
        found, told = reflection_of(path, x, level, below, inversion="fixed_point", iterations=iterations)
        back = path.move(found, Modes(WEAK, path)(found, s), level, below)
        ((step, residual),) = told
        assert step == 0 and residual.shape == (len(x),)
        # VP's residual is that of VE latents, and a step down shrinks it a little.
        scale = found.abs().flatten().clamp_min(1e-9)
        assert bool(((back - y).abs().flatten() <= residual * (x.abs().flatten() + scale) * 1.01 + 1e-12).all())
    assert float((back - y).abs().max()) < 1e-9


def test_a_sample_that_does_not_converge_keeps_its_best_and_says_so():
    """Steps of ten steps' length between the modes: some iterations grow, and none may run off to another mode."""
    sigmas = grid(VE, 10)
    x = torch.linspace(-6, 6, 2001, dtype=torch.float64).view(-1, 1, 1, 1)
    for i in range(9):
        high, low = float(sigmas[i]), float(sigmas[i + 1])
        first, ((_, one),) = reflection_of(VE, x, high, low, inversion="fixed_point", iterations=1)
        found, ((_, many),) = reflection_of(VE, x, high, low, inversion="fixed_point", iterations=20)
        assert bool((many <= one).all())
        stuck = (many == one) & (one > 0)
        assert torch.equal(found.flatten()[stuck], first.flatten()[stuck])
        same, ((_, none),) = reflection_of(VE, x, high, low, weak=STRONG, inversion="fixed_point", iterations=20)
        assert float((same - x).abs().max()) < 1e-9 and float(none.max()) < 1e-9


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("inversion", INVERSIONS)
@pytest.mark.parametrize("config", [{}, {"end": 0.5}, {"begin": 0.5, "rounds": 3}, PLAIN])
def test_calls_are_what_the_cost_says(path, base, inversion, config):
    sigmas = torch.cat([grid(path, 9), torch.zeros(1, dtype=torch.float64)])  # ten steps
    settings = ReflectionConfig(**config, inversion=inversion, iterations=4, base=base)
    main, down, weak = (Modes(w, path) for w in (STRONG, STRONG, WEAK))
    sample_reflection(
        main, start(path, sigmas[0], 3), sigmas, disable=True, path=path, weak=weak, reflecting=down, config=settings
    )
    cost = settings.cost(sigmas)
    assert (len(main.calls), len(down.calls), len(weak.calls)) == (cost.model, cost.reflecting, cost.weak)
    reflections = len(settings.steps(sigmas)) * settings.rounds
    steps = 19 if base == "heun" else 10
    assert cost.total == steps + (1 + {"euler": 1, "midpoint": 2, "fixed_point": 4}[inversion]) * reflections
    assert reflections == {"{}": 9, "{'end': 0.5}": 5, "{'begin': 0.5, 'rounds': 3}": 12}.get(str(config), 0)


def test_the_papers_cost_is_that_of_euler():
    """T + 2 lambda with T = 50 and lambda = T - 1: 148."""
    sigmas = torch.cat([grid(VE, 49), torch.zeros(1, dtype=torch.float64)])
    assert ReflectionConfig().cost(sigmas).total == 148


def test_each_model_is_asked_at_the_level_of_its_latent():
    sigmas = torch.tensor([8.0, 4.0, 2.0, 0.0], dtype=torch.float64)
    x = start(VE, sigmas[0], 2)

    def levels(**config):
        main, down, weak = Modes(STRONG), Modes(STRONG), Modes(WEAK)
        sample_reflection(main, x, sigmas, disable=True, weak=weak, reflecting=down, config=ReflectionConfig(**config))
        return main.calls, down.calls, weak.calls

    assert levels() == ([8, 4, 2], [8, 4], [4, 2])
    assert levels(inversion="midpoint") == ([8, 4, 2], [8, 4], [4, 6, 2, 3])
    assert levels(inversion="fixed_point", iterations=2) == ([8, 4, 2], [8, 4], [8, 8, 4, 4])
    assert levels(rounds=2, end=0.4) == ([8, 4, 2], [8, 8], [4, 4])


def test_the_model_that_goes_down_may_be_another():
    sigmas = grid(VE, 20)
    x = start(VE, sigmas[0], 500)
    reversed_ = sample_reflection(
        Modes(STRONG), x, sigmas, disable=True, weak=Modes(STRONG), reflecting=Modes(WEAK), config=ReflectionConfig()
    )
    assert left(reversed_) < 0.1 < left(sampled(VE, STRONG, WEAK, count=500))


def test_the_history_of_dpmpp_2m_is_that_of_its_steps():
    """Without a gap every step extrapolates as the plain sampler; with one, from the step's own answers."""
    sigmas = grid(VE, 12)
    x, model = start(VE, sigmas[0], 300), Modes(STRONG)
    plain = SAMPLERS["dpmpp_2m"](model, x, sigmas, disable=True)
    euler = SAMPLERS["euler"](model, x, sigmas, disable=True)
    exact = ReflectionConfig(inversion="fixed_point", base="dpmpp_2m")
    found = sample_reflection(model, x, sigmas, disable=True, weak=model, config=exact)
    assert float((found - plain).abs().max()) < 1e-9 < 1e-2 < float((euler - plain).abs().max())

    steps = []
    out = sample_reflection(
        model, x, sigmas, None, steps.append, True, weak=Modes(WEAK), config=ReflectionConfig(base="dpmpp_2m")
    )
    here, last = steps[-1], steps[-2]
    t, t_next, t_last = (-s.log() for s in (sigmas[-2], sigmas[-1], sigmas[-3]))
    r = (t - t_last) / (t_next - t)
    target = (1 + 1 / (2 * r)) * here["denoised"] - 1 / (2 * r) * last["denoised"]
    expected = sigmas[-1] / sigmas[-2] * here["x"] + (1 - sigmas[-1] / sigmas[-2]) * target
    torch.testing.assert_close(out, expected)
