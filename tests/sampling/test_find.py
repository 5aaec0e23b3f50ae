"""FIND: true log-probabilities and divergences, an unbiased gradient, and the optimum in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from retort.sampling.find import FindConfig, Policy, advantages, policy_gradient
from retort.sampling.path import FLOW
from retort.sampling.prior import Prior
from retort.sampling.search import Budget, candidate_seed, search
from retort.sampling.transition import Transition

SHAPE = (4, 1, 1)
C = torch.tensor([0.8, -0.5, 1.2, 0.3], dtype=torch.float64).view(SHAPE)
DIVERGENCES = ["reverse_kl", "forward_kl", "jeffreys"]


def policy(seed=0):
    g = torch.Generator().manual_seed(seed)
    return Policy(*(0.5 * torch.randn(SHAPE, generator=g, dtype=torch.float64) for _ in range(2)))


def find(config, calls, tau2=0.5, state=None, **options):
    """An identity sampler: x0 = z, r = -|z - c|^2 / (2 tau^2)."""
    given = {"batch": 256, **options}
    lent = {name: given.pop(name) for name in ("batch", "mixed_levels", "calls_per_eval", "identity") if name in given}
    prior = Prior(lambda x, sigma: x, FLOW, torch.tensor([1.0, 0.0], dtype=torch.float64), SHAPE, **lent)
    return search(
        prior, config, Budget(calls=calls), lambda x: -(x - C).square().flatten(1).sum(1) / (2 * tau2), seed=1,
        transition=Transition("ode"), state=state, **given,
    )  # fmt: skip


def optimum(name, k, tau2):
    """By descent on the closed form itself: E r - k D."""
    p = Policy(torch.zeros(SHAPE, dtype=torch.float64), torch.zeros(SHAPE, dtype=torch.float64))
    for _ in range(3000):
        variance = (2 * p.log_std).exp()
        d_mean, d_log_std = p.pull(name)
        p = Policy(
            p.mean + 0.02 * variance * (-(p.mean - C) / tau2 - k * d_mean),
            p.log_std + 0.01 * (-variance / tau2 - k * d_log_std),
        )
    return p


def test_log_probabilities_are_sums():
    p, z = policy(), torch.randn(5, *SHAPE, dtype=torch.float64)
    expected = torch.distributions.Normal(p.mean, p.log_std.exp()).log_prob(z).flatten(1).sum(1)
    torch.testing.assert_close(p.log_prob(z), expected)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_and_their_gradients(name):
    p, prior = policy(), torch.distributions.Normal(0.0, 1.0)
    here = torch.distributions.Normal(p.mean, p.log_std.exp())
    kl = torch.distributions.kl_divergence
    parts = {"reverse_kl": kl(here, prior).sum(), "forward_kl": kl(prior, here).sum()}
    expected = parts.get(name, sum(parts.values()))
    assert float(p.divergence(name)) == pytest.approx(float(expected), abs=1e-12)
    p = Policy(p.mean.requires_grad_(), p.log_std.requires_grad_())
    gradients = torch.autograd.grad(p.divergence(name), [p.mean, p.log_std])
    torch.testing.assert_close(p.pull(name), gradients)
    plain = Policy(torch.zeros(SHAPE), torch.zeros(SHAPE))
    assert float(plain.divergence(name)) == 0 and not any(t.any() for t in plain.pull(name))


def test_the_gradient_is_unbiased_and_the_baseline_does_not_move_its_mean():
    """dE r / dmu = -(mu - c) / tau^2, dE r / dlog std = -std^2 / tau^2; groups of two, the hardest for a baseline."""
    p, tau2, groups = policy(), 0.5, 60_000
    unit = torch.randn(groups, 2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = p.noise(unit)
    rewards = -(z - C).square().flatten(2).sum(2) / (2 * tau2)
    weights = torch.stack([advantages(r) for r in rewards[:5]])
    torch.testing.assert_close(weights[:, 0], rewards[:5, 0] - rewards[:5, 1])
    weights = (rewards - rewards.mean(1, keepdim=True)) * 2
    d_mean, d_log_std = policy_gradient(p, z.flatten(0, 1), weights.flatten())
    torch.testing.assert_close(d_mean, -(p.mean - C) / tau2, atol=0.1, rtol=0)
    torch.testing.assert_close(d_log_std, -(2 * p.log_std).exp() / tau2, atol=0.1, rtol=0.05)


def learned(config, steps=900, tau2=0.5):
    """The policy after so many steps on r = -|z - c|^2 / (2 tau^2), without the search around it."""
    state, generator = config.fresh({"shape": SHAPE}), torch.Generator().manual_seed(1)
    for _ in range(steps):
        z = state.policy.noise(torch.randn(config.samples, *SHAPE, generator=generator, dtype=torch.float64))
        state.learn(z, -(z - C).square().flatten(1).sum(1) / (2 * tau2))
    return state.policy


@pytest.mark.parametrize("k", [1.0, 0.3])
def test_the_optimum_in_closed_form(k):
    """mu = c / (1 + k tau^2), std^2 = k tau^2 / (1 + k tau^2)."""
    tau2 = 0.5
    got = learned(FindConfig(samples=64, rate=0.08, decay=0.02, pull=k, normalise=False))
    torch.testing.assert_close(got.mean, C / (1 + k * tau2), atol=0.03, rtol=0)
    std = torch.full_like(C, (k * tau2 / (1 + k * tau2)) ** 0.5)
    torch.testing.assert_close(got.log_std.exp(), std, atol=0.03, rtol=0)


@pytest.mark.parametrize("name", DIVERGENCES[1:])
def test_the_optimum_under_other_divergences(name):
    got = learned(FindConfig(samples=64, rate=0.08, decay=0.02, pull=0.5, normalise=False, divergence=name))
    expected = optimum(name, 0.5, 0.5)
    torch.testing.assert_close(got.mean, expected.mean, atol=0.04, rtol=0)
    torch.testing.assert_close(got.log_std.exp(), expected.log_std.exp(), atol=0.03, rtol=0)


def test_a_round_of_the_search_is_a_step_on_its_candidates_noise():
    config = FindConfig(samples=5)
    state = find(config, 10).state
    by_hand = config.fresh({"shape": SHAPE})
    for step in range(2):
        generators = [torch.Generator().manual_seed(candidate_seed(1, 5 * step + i)) for i in range(5)]
        unit = torch.stack([torch.randn(SHAPE, dtype=torch.float64, generator=g) for g in generators])
        z = by_hand.policy.noise(unit)
        by_hand.learn(z, -(z - C).square().flatten(1).sum(1))
    assert state.step == 2 and torch.equal(state.policy.mean, by_hand.policy.mean)


def test_descent_on_the_closed_form_finds_the_known_one():
    p = optimum("reverse_kl", 1.0, 0.5)
    torch.testing.assert_close(p.mean, C / 1.5, atol=1e-6, rtol=0)
    torch.testing.assert_close(p.log_std.exp(), torch.full_like(C, (1 / 3) ** 0.5), atol=1e-6, rtol=0)


def test_the_first_epoch_is_plain_reinforce_and_the_clip_stops_the_rest():
    """The ratio is 1 at first; a step that large leaves no sample inside the clip that still pushes."""
    z = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards = z.flatten(1).sum(1)

    def policy_of(**options):
        state = FindConfig(samples=6, pull=0.0, normalise=False, **options).fresh({"shape": SHAPE})
        state.learn(z, rewards)
        return state.policy

    d_mean, d_log_std = policy_gradient(Policy(torch.zeros(SHAPE), torch.zeros(SHAPE)), z, advantages(rewards))
    once = policy_of(rate=0.05)
    torch.testing.assert_close(once.mean, 0.05 * d_mean)
    torch.testing.assert_close(once.log_std, 0.025 * d_log_std)
    torch.testing.assert_close(
        policy_of(rate=2.0, epochs=2, clip=1e-3).mean, policy_of(rate=1.0).mean, atol=0.2, rtol=0.2
    )
    torch.testing.assert_close(policy_of(rate=1e-6, epochs=4).mean, policy_of(rate=1e-6).mean, atol=1e-10, rtol=1e-3)


@pytest.mark.parametrize("epochs", [2, 4])
def test_later_epochs_move_the_policy_on_latents_of_usual_size(epochs):
    """At the default rate two epochs of half the rate are one of the whole: no sample is clipped for its size."""
    shape = (4, 64, 64)
    z = torch.randn(8, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moved = []
    for count in (1, epochs):
        state = FindConfig(epochs=count).fresh({"shape": shape})
        state.learn(z, z.flatten(1).sum(1))
        moved.append(state.policy.mean)
    torch.testing.assert_close(moved[1].norm(), moved[0].norm(), rtol=0.1, atol=0)
    assert float((moved[1] * moved[0]).sum() / moved[1].norm() / moved[0].norm()) > 0.99


def test_any_scale_of_reward_gives_the_same_policy_when_normalised():
    policies = []
    for factor in (1.0, 1000.0):
        state = FindConfig().fresh({"shape": SHAPE})
        for step in range(5):
            z = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            state.learn(z, factor * z.flatten(1).sum(1))
        policies.append(state.policy)
    torch.testing.assert_close(policies[0].mean, policies[1].mean)
    state = FindConfig().fresh({"shape": SHAPE})
    state.learn(z, torch.zeros(8, dtype=torch.float64))
    assert not state.policy.mean.any()


def test_its_noise_is_the_plain_noise_moved_and_scaled():
    state = find(FindConfig(), 80).state
    plain = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(state.noise(9), state.policy.noise(plain))
    assert state.noise(9).dtype == torch.float32 and not torch.equal(state.noise(9), state.noise(9, 1))


def test_a_better_policy_draws_better_noise():
    state = find(FindConfig(samples=16, rate=0.2), 16 * 60).state
    drawn = torch.stack([state.noise(5, m) for m in range(200)])
    plain = torch.stack([FindConfig().fresh(state.setting).noise(5, m) for m in range(200)])
    assert float((drawn - C).square().mean()) < 0.6 * float((plain - C).square().mean())


@pytest.mark.parametrize(
    ("field", "value"),
    [("samples", 1), ("epochs", 0), ("rate", 0.0), ("rate", math.nan), ("decay", -1.0), ("pull", -0.1), ("clip", 0.0),
     ("divergence", "jensen_shannon")],
)  # fmt: skip
def test_settings_are_checked(field, value):
    with pytest.raises(ValueError, match=f"{field} must .*{value}"):
        FindConfig(**{field: value})
