"""What searches choose, one choice at a time: which child, which latent, which side of a clip."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from retort.sampling.accounts import Budget, candidate_seed
from retort.sampling.find import FindConfig
from retort.sampling.particles import ValueConfig
from retort.sampling.path import FLOW, VE
from retort.sampling.prior import Prior
from retort.sampling.search import Trajectory, search
from retort.sampling.tree import ROOT, TreeConfig

BOTH = pytest.mark.parametrize("path", [VE, FLOW], ids=["VE", "FLOW"])
# Rewards of the grandchildren below each child of the root.
REWARDS = [[0.3, -0.2], [0.9, 0.1], [-0.4, 0.5]]


def grown(config, rewards=REWARDS):
    """A tree of three children with two each."""
    sigmas = [1.0, 0.6, 0.3, 0.0]
    setting = {"path": {"kind": "FLOW", "noise_scale": 1.0}, "shape": [1, 2, 2], "transition": {"kind": "ancestral"},
               "sigmas": sigmas}  # fmt: skip
    tree = config.fresh(setting)
    for some in rewards:
        parent = ROOT
        for reward in some:
            tree.pending.append((parent, tree.drawn))
            tree._promised[parent] = tree._promised.get(parent, 0) + 1
            below = len(tree.stops) - 1 - int(tree.place[parent])
            kept = [torch.full((1, 2, 2), reward)] * below
            tree._take_in([Trajectory(tree.drawn, torch.zeros(1), torch.Generator(), kept=kept)], [reward])
            tree.drawn += 1
            parent = int(tree.children(ROOT)[-1])
    return tree


def chances(values, lam):
    weights = [math.exp(lam * v) for v in values]
    return [w / sum(weights) for w in weights]


def law(lam):
    """Chances of the six paths, by the rewards: (uniform, Boltzmann)."""
    soft = [math.log(sum(math.exp(lam * r) for r in some) / 2) / lam for some in REWARDS]
    first = chances(soft, lam)
    return np.full(6, 1 / 6), np.array([p * q for p, some in zip(first, REWARDS, strict=True)
                                        for q in chances(some, lam)])  # fmt: skip


@pytest.mark.parametrize("selection", ["uniform", "boltzmann", "mixed"])
@pytest.mark.parametrize("lam", [1.0, 2.5])
def test_a_descent_s_chances(selection, lam):
    """Boltzmann's are exp(lambda v) at each node; "mixed" is one of the two for a whole descent, each half the time."""
    # A node may have ceil(visits^0.01), so two children: full at one visit already for the leaves' parents.
    tree = grown(TreeConfig(lam=lam, selection=selection, widening=1.0, growth=0.001, branch=(1,)))
    uniform, soft = law(lam)
    wanted = {"uniform": uniform, "boltzmann": soft, "mixed": (uniform + soft) / 2}[selection]
    leaves = tree.leaves.tolist()
    counts, times, kept = np.zeros(6), 20_000, {}
    rng = np.random.default_rng(3)
    for _ in range(times):
        path, expand = tree._descend(rng, kept)
        assert not expand
        counts[leaves.index(path[-1])] += 1
    # Five standard deviations of a share.
    assert np.abs(counts / times - wanted).max() < 5 * (0.25 / times) ** 0.5
    assert selection == "uniform" or np.abs(wanted - uniform).max() > 5 * 2 * (0.25 / times) ** 0.5


def test_uct_in_standard_deviations_of_the_rewards_with_visits_counted_as_leaves_are_chosen():
    """argmax v + std sqrt(log N / n), N and n with the descents that were made in the same batch."""
    close = [[0.3, -0.2], [0.6, -0.1], [-0.3, 0.5]]
    tree = grown(TreeConfig(lam=2.0, selection="uct", widening=1.0, growth=0.5, branch=(1,), leaves=12), close)
    rewards = [r for some in close for r in some]
    middle = sum(rewards) / 6
    std = math.sqrt(sum((r - middle) ** 2 for r in rewards) / 6)
    first = tree.children(ROOT).tolist()
    below = {ROOT: first, **{node: tree.children(node).tolist() for node in first}}
    value = {leaf: reward for node, some in zip(first, close, strict=True)
             for leaf, reward in zip(below[node], some, strict=True)}  # fmt: skip
    value |= {node: math.log(sum(math.exp(2.0 * r) for r in some) / 2) / 2.0
              for node, some in zip(first, close, strict=True)}  # fmt: skip
    visits = {node: 1 for node in (ROOT, *value)} | {ROOT: 9, first[0]: 3, first[1]: 4, first[2]: 3}
    for node, count in visits.items():
        tree.visits[node] = count
    promised, chosen = dict.fromkeys(below, 0), []
    while len(chosen) < 12:
        path = [ROOT]
        while path[-1] in below and len(below[path[-1]]) + promised[path[-1]] >= math.sqrt(visits[path[-1]]):
            here = path[-1]
            unit = std * math.sqrt(math.log(visits[here]))
            path.append(max(below[here], key=lambda kid: value[kid] + unit / math.sqrt(visits[kid])))
        for node in path:
            visits[node] += 1
        if path[-1] in below:
            promised[path[-1]] += 1
            chosen.append(path[-1])
    assert tree._choose(0)
    assert [node for node, _ in tree.pending] == chosen and len(set(chosen)) > 2
    assert {node: int(tree.visits[node]) for node in visits} == visits


@BOTH
def test_svdd_goes_on_from_the_candidate_with_the_best_value(path):
    """The next latents are an ancestral step from the best candidate and its x0, with the noise of each generator."""
    shape, m, seed = (2, 2, 2), 4, 11
    sigmas = [1.0, 0.7, 0.4, 0.2, 0.0] if path is FLOW else [9.0, 3.0, 1.1, 0.4, 0.0]
    seen = []

    def model(x, sigma):
        x0 = torch.tanh(x) + 0.3 * x.mean((1, 2, 3), keepdim=True)
        seen.append((x.clone(), x0))
        return x0

    def reward(x0):
        return -(x0 - 0.4).abs().mean((1, 2, 3))

    prior = Prior(model, path, torch.tensor(sigmas, dtype=torch.float64), shape, batch=8)
    result = search(prior, ValueConfig(candidates=m), Budget(calls=1 + 3 * m), reward, seed=seed)
    assert [len(x) for x, _ in seen] == [1, m, m, m]
    # The first candidate goes on with the sample's own noise.
    own = torch.Generator().manual_seed(candidate_seed(seed, 0) + 1)
    chosen = 0
    for step in range(3):
        (x, x0), here, there = seen[step], sigmas[step], sigmas[step + 1]
        chosen = int(reward(x0).argmax())
        noise = torch.randn(shape, dtype=torch.float64, generator=own)
        if path is FLOW:
            # Down to `low` on the straight line, the clean part restored, noise up to the next level.
            low = there**2 / here
            down = (low / here) * x[chosen] + (1 - low / here) * x0[chosen]
            keep = (1 - there) / (1 - low)
            wanted = keep * down + math.sqrt(there**2 - (keep * low) ** 2) * noise
        else:
            up = there * math.sqrt(here**2 - there**2) / here
            wanted = x0[chosen] + (there**2 / here**2) * (x[chosen] - x0[chosen]) + up * noise
        torch.testing.assert_close(seen[step + 1][0][0], wanted, rtol=1e-9, atol=1e-9)
    (x, x0) = seen[3]
    best = int(reward(x0).argmax())
    assert any(int(reward(each).argmax()) for _, each in seen[1:])
    torch.testing.assert_close(result.best.latent.double(), x0[best], rtol=1e-6, atol=1e-6)


def test_find_s_later_epochs_climb_ppo_s_objective():
    """n mean min(ratio A, clip(ratio, 1 - c, 1 + c) A) - pull D by autograd, in natural-gradient steps.

    The ratio is the n-th root of the densities', n the size of a latent.
    """
    config = FindConfig(samples=6, rate=3.0, epochs=3)
    assert config.normalise and config.clip == 0.2 and config.pull > 0
    shape = (2, 1, 2)
    state = config.fresh({"shape": shape})
    generator = torch.Generator().manual_seed(2)
    z, rewards = (torch.randn(6, *s, generator=generator, dtype=torch.float64) for s in (shape, ()))
    gain = torch.stack([(rewards[k] - (rewards.sum() - rewards[k]) / 5) for k in range(6)]) / rewards.var().sqrt()
    mean, log_std = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    clipped = {True: 0, False: 0}

    def log_prob(m, s):
        return torch.distributions.Normal(m, s.exp()).log_prob(z).sum((1, 2, 3))

    before = log_prob(mean, log_std)
    for _ in range(3):
        m, s = mean.clone().requires_grad_(), log_std.clone().requires_grad_()
        ratio = ((log_prob(m, s) - before) / 4).exp()
        bounded = ratio.clamp(0.8, 1.2)
        pull = (0.5 * (m**2 + (2 * s).exp() - 1) - s).sum()
        (4 * torch.minimum(ratio * gain, bounded * gain).mean() - config.pull * pull).backward()
        for up in (True, False):
            clipped[up] += int(((ratio * gain > bounded * gain) & ((gain > 0) == up)).sum())
        mean = mean + (2 * log_std).exp() * m.grad
        log_std = log_std + 0.5 * s.grad
    state.learn(z, rewards)
    assert clipped[True] and clipped[False]
    torch.testing.assert_close(state.policy.mean, mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(state.policy.log_std, log_std, rtol=1e-9, atol=1e-12)
