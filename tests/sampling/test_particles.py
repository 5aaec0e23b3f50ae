"""Best-of-N, Feynman-Kac steering and SVDD: exact weights, the tilted law, the law of the best, accounts, settings."""

from __future__ import annotations

import math

import pytest
import torch

from retort.sampling.particles import BestOfConfig, SteeringConfig, ValueConfig, _draw
from retort.sampling.path import FLOW, VE
from retort.sampling.prior import Prior
from retort.sampling.search import Budget, search
from retort.sampling.transition import Transition

each_path = pytest.mark.parametrize("path", [VE, FLOW], ids=["VE", "FLOW"])
each_potential = pytest.mark.parametrize("potential", ["difference", "max", "add"])


def steer(model, config, calls, **options):
    given = {"evaluate": model.reward, "budget": Budget(calls=calls), **options}
    prior = Prior(model, model.path, model.sigmas, (1, 1, 1), batch=given.pop("batch", 256))
    return search(prior, config, given.pop("budget"), given.pop("evaluate"), seed=model.seed, **given)


def off(model, latents, masses, slope=None):
    return float((model.masses(latents, slope) - masses).abs().sum() / 2)


def test_the_law_of_the_best_of_n():
    """P(max <= y) = F(y)^N, for a reward that is a unit Gaussian."""
    n, searches = 8, 1000
    best = [
        search(
            Prior(lambda x, sigma: x, FLOW, torch.tensor([1.0, 0.0]), (1, 1, 1), batch=3), BestOfConfig(),
            Budget(calls=n), lambda x: x.flatten(), seed=seed, transition=Transition("ode"),
        ).best.reward
        for seed in range(searches)
    ]  # fmt: skip
    law = torch.special.ndtr(torch.tensor(sorted(best), dtype=torch.float64)) ** n
    steps = torch.arange(searches + 1) / searches
    gap = torch.maximum((law - steps[:-1]).abs(), (law - steps[1:]).abs()).max()
    assert float(gap) < 1.63 / searches**0.5  # Kolmogorov-Smirnov at 1 %


@each_path
@each_potential
def test_whatever_the_potential_the_weight_of_a_whole_way_is_the_rewards(potential, path, mixture):
    """Without resampling: plain samples, and log-weights lambda r(x0)."""
    model = mixture(path)
    config = SteeringConfig(particles=40, lam=2.0, potential=potential, at=(1, 2, 3), ess=0.0)
    state = steer(model, config, 160).state
    assert state.log_weights.tolist() == pytest.approx((2.0 * state.rewards).tolist(), abs=1e-9)
    assert state.ledger.calls == model.calls == 160 and state.ledger.rewards == 40 * 4


@each_path
@each_potential
def test_steering_reaches_the_tilted_law(potential, path, mixture):
    # "add" tilts by the sum of three rewards on the way: at a large lambda its weights vary too much for a test.
    model, lam = mixture(path), 0.3 if potential == "add" else 1.0
    config = SteeringConfig(particles=4000, lam=lam, potential=potential, at=(1, 2, 3))
    state = steer(model, config, 16_000).state
    assert off(model, state.draw(20_000, 0), model.tilted(lam * model.slope)[1]) < 0.06


@each_path
def test_lambda_zero_is_the_prior(path, mixture):
    model = mixture(path)
    state = steer(model, SteeringConfig(particles=3000, lam=0.0, ess=1.0), 12_000).state
    assert off(model, state.draw(20_000, 0), model.w, 0.0) < 0.04
    ends = []

    def evaluate(x):
        ends.append(x.clone())
        return x.flatten()

    model = mixture(path)
    result = steer(model, ValueConfig(candidates=2, lam=0.0, at=(1,)), 5 * 1500, evaluate=evaluate)
    assert result.state.drawn == 1500
    # Of a round's batches the last is the finished samples'.
    finished = torch.cat([x for x in ends if len(x) == 128 or len(x) == 1500 % 128])
    assert off(model, finished, model.w, 0.0) < 0.04


def test_resampling_is_systematic():
    weights = torch.tensor([0.1, 0.45, 0.05, 0.4], dtype=torch.float64)
    for seed in range(20):
        counts = torch.bincount(_draw(weights.log(), 20, torch.Generator().manual_seed(seed)), minlength=4)
        assert (counts - 20 * weights).abs().max() < 1
    free = _draw(weights.log() + 7, 50_000, torch.Generator().manual_seed(0), systematic=False)
    assert float((torch.bincount(free) / 50_000 - weights).abs().max()) < 0.01


@pytest.mark.parametrize("ess", [0.0, 1.0])
def test_copies_part_and_a_low_ess_is_what_resamples(ess, mixture):
    model, seen = mixture(VE), []
    config = SteeringConfig(particles=16, lam=20.0, at=(2,), ess=ess)

    def remember(x, sigma):
        seen.append(x.clone())
        return model(x, sigma)

    prior = Prior(remember, VE, model.sigmas, (1, 1, 1), batch=16)
    state = search(prior, config, Budget(calls=64), model.reward, seed=0).state
    assert len(seen) == 4 and len(seen[3].unique()) == 16 == len(state.latents.unique())


@each_path
def test_choosing_by_value_raises_the_reward(path, mixture):
    plain, greedy = (
        [
            steer(mixture(path, seed=s), ValueConfig(candidates=m), 4 + 3 * (m - 1), keep=1).best.reward
            for s in range(30)
        ]
        for m in (1, 6)
    )
    assert sum(greedy) / 30 > sum(plain) / 30 + 1.0


@pytest.mark.parametrize(("at", "cost"), [(None, 4 + 3 * 4), ((2,), 4 + 4), ((1, 3), 4 + 2 * 4)])
def test_values_calls(at, cost, mixture):
    model = mixture(VE)
    result = steer(model, ValueConfig(candidates=5, at=at), 10 * cost + 3)
    assert result.ledger.calls == model.calls == 10 * cost and result.state.drawn == 10
    assert result.ledger.rewards == 10 * (1 + 5 * (cost - 4) // 4)


def test_halfway_finds_serve_until_there_is_a_finished_one(mixture):
    model, seen = mixture(VE), []

    def watch(state):
        seen.append([c.finished for c in state.best.found])

    result = steer(model, SteeringConfig(particles=4, at=(1, 2)), 16, callback=watch)
    assert [False] * 4 in seen and all(c.finished for c in result.top)


def test_without_noise_they_are_refused(mixture):
    model = mixture(VE)
    for config in (SteeringConfig(), ValueConfig()):
        with pytest.raises(ValueError, match="transition is ode, which draws no noise, so copies"):
            steer(model, config, 50, batch=4, transition=Transition("ode"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SteeringConfig(particles=0), "particles must be between 1 and 1000000, got 0"),
        (lambda: SteeringConfig(lam=-1), "lam must be between 0 and 1e.06, got -1"),
        (lambda: SteeringConfig(lam=math.inf), "lam must be between .* got inf: 10 is the paper"),
        (lambda: SteeringConfig(potential="sum"), "potential must be one of difference, max, add, got 'sum'"),
        (lambda: SteeringConfig(ess=2), "ess must be between 0 and 1, got 2"),
        (lambda: SteeringConfig(at=(0, 1)), r"at must ascend and be above 0.*\(0, 1\)"),
        (lambda: ValueConfig(at=(2, 1)), r"at must ascend and be above 0.*\(2, 1\)"),
        (lambda: ValueConfig(candidates=0), "candidates must be between 1 and 1024, got 0"),
        (lambda: ValueConfig(lam=math.nan), "lam must be between 0 and inf, got nan"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_steps_that_the_schedule_lacks_are_refused(mixture):
    for config in (SteeringConfig(at=(4,)), ValueConfig(at=(1, 9))):
        with pytest.raises(ValueError, match="at must end below the 4 steps"):
            steer(mixture(VE), config, 50)
    with pytest.raises(ValueError, match="no population is finished yet"):
        SteeringConfig().fresh(steer(mixture(VE), BestOfConfig(), 8).state.setting).draw(1, 0)
