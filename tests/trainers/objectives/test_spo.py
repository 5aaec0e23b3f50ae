"""SPO: the loss of one step's pair in closed form, whose pair it is, and what stays without a gradient."""

from __future__ import annotations

import math

import pytest
import torch

from retort.sampling.path import FLOW, VE, VP, broadcast
from retort.sampling.transition import Transition
from retort.trainers.objectives.parts.contract import Batch, Draws, alpha_sigma
from retort.trainers.objectives.spo import SPO, SPOConfig, step_preference

SHAPE = (1, 3, 3)
ROW = "blocks.0.affine.lora_A.weight"
PATHS = [(VE, "ancestral"), (FLOW, "ancestral"), (FLOW, "sde"), (VP, "ancestral")]


def _mean(x, prompts, batch):
    return x.flatten(1).mean(1)


def _setting(affine, path, step="ancestral", **config):
    levels = [0.9, 0.6, 0.3] if path is FLOW else [4.0, 1.5, 0.5]
    denoiser = affine(path, levels, 0.4, 0.8)
    settings = {"steps": 3, "cfg": 1.0, "step": step, "candidates": 3, "trained": 0, "skipped": 0.0, "beta": 2.0}
    objective = SPO(SPOConfig(**{**settings, **config}), denoiser)
    objective.sigmas = torch.tensor([*levels, 0.0])
    objective.reward = _mean
    return objective, Batch(Draws(5, 0, (0, 1)), SHAPE, None, prompts=("a", "b"))


def _seen(path, x, sigma):
    """x as the affine network sees it."""
    return x * broadcast(alpha_sigma(path, sigma)[0], x) if path is VE else x


def _gradient(objective, batch):
    row = objective.denoiser.adapters.parameters("student")[ROW]
    row.grad, found = None, []
    for loss in objective.losses(batch, 0):
        assert objective.denoiser.adapters.current is None
        with objective.denoiser.adapter("student"):
            loss.value.backward()
        found.append(loss)
    return row.grad[0].clone(), found


def test_preference_is_the_ratio_of_normals():
    g = torch.Generator().manual_seed(0)
    mean, reference, winner, loser = (torch.randn(3, 2, 4, generator=g, dtype=torch.float64) for _ in range(4))
    std = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64).view(3, 1, 1)

    def ratio(x):
        laws = [torch.distributions.Normal(m, std) for m in (mean, reference)]
        return (laws[0].log_prob(x) - laws[1].log_prob(x)).flatten(1).mean(1)

    expected = -torch.sigmoid(0.7 * (ratio(winner) - ratio(loser))).log()
    assert torch.allclose(step_preference(mean, reference, std, winner, loser, 0.7), expected, rtol=1e-9)
    assert torch.allclose(
        step_preference(mean, mean, std, winner, loser, 0.7), torch.full((3,), math.log(2), dtype=torch.float64)
    )


@pytest.mark.parametrize(("path", "step"), PATHS)
def test_gradient_at_the_reference_is_its_closed_form(affine, path, step):
    # At the reference -log sigmoid has slope -1/2: dL / dc = -(beta / 2) mean((w - l) k) / std^2, k = d mean / d x0.
    objective, batch = _setting(affine, path, step)
    objective.denoiser.set_affine("student", 0.0, 0.0)
    got, losses = _gradient(objective, batch)
    assert [float(loss.value.detach()) for loss in losses] == pytest.approx([math.log(2) / 2] * 2, abs=1e-6)

    draws, sigmas, rows = batch.draws, objective.sigmas, torch.arange(2)
    transition, denoiser = Transition(step), objective.denoiser
    x = path.unit_start(sigmas[0], draws.normal("start", SHAPE))
    expected = torch.zeros(6)
    with torch.no_grad():
        for index in (0, 1):
            here, there = sigmas[index].expand(2), sigmas[index + 1].expand(2)
            x0 = denoiser.predict_x0(x, here, None)
            mean, std = transition.moments(path, x, x0, here, there)
            k = (transition.moments(path, x, x0 + 1, here, there)[0] - mean).mean()
            noise = [draws.normal(f"step {index} of {j}", SHAPE) for j in range(3)]
            candidates = torch.stack([mean + std * n for n in noise])
            scores = torch.stack([_mean(denoiser.predict_x0(c, there, None), None, None) for c in candidates])
            apart = candidates[scores.argmax(0), rows] - candidates[scores.argmin(0), rows]
            for row, feature in ((index, _seen(path, x, here)), (3 + index, torch.ones_like(x))):
                each = -(2.0 / 2) * (apart * k * feature / std.square()).flatten(1).mean(1)
                expected[row] += each.mean() / 2
            x = candidates[draws.integers(f"onward {index}", 0, 3), rows]
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-5)
    assert float(expected.abs().max()) > 0.01


def test_equal_rewards_teach_nothing(affine, path):
    objective, batch = _setting(affine, path)
    objective.denoiser.set_affine("student", 0.2, 0.3)
    objective.reward = lambda x, prompts, batch: torch.full((len(x),), 0.1)
    got, losses = _gradient(objective, batch)
    assert float(got.abs().max()) == 0
    assert all(float(loss.metrics["reward_spread"]) == 0 for loss in losses)


def test_which_steps_are_judged(affine):
    objective, batch = _setting(affine, VE, skipped=0.5)
    seen = []
    objective.reward = lambda x, prompts, batch: seen.append(1) or _mean(x, prompts, batch)
    assert len(_gradient(objective, batch)[1]) == 1 and len(seen) == 3
    objective, batch = _setting(affine, VE, trained=1)
    counts = set()
    for step in range(12):
        batch.draws = Draws(5, step, (0, 1))
        losses = _gradient(objective, batch)[1]
        assert len(losses) == 1
        counts.add(round(float(losses[0].metrics["reward"]), 3))
    assert len(counts) > 2


def test_it_climbs(affine, path, play):
    objective, _ = _setting(affine, path, beta=1.0)
    objective.reward = lambda x, prompts, batch: -(x - 1.5).square().flatten(1).mean(1)
    objective.denoiser.set_affine("student", 0.0, 0.0)

    def batch_of(step):
        return Batch(Draws(0, step, tuple(range(16))), (1, 1, 1), None, prompts=("a",) * 16)

    def end():
        batch = batch_of(999)
        x0 = objective.sample(batch.draws.normal("x", batch.shape), None, None)
        return float((x0 - 1.5).square().mean())

    with torch.no_grad(), objective.denoiser.adapter("student"):
        before = end()
    play(objective, objective.denoiser, batch_of, 40, {"student": 0.02})
    with torch.no_grad(), objective.denoiser.adapter("student"):
        assert end() < 0.8 * before


def test_what_cannot_be_is_said(affine):
    with pytest.raises(ValueError, match="choose 'ancestral'"):
        SPO(SPOConfig(step="sde"), affine(VE))
    bad = {"step": "ode", "steps": 1, "candidates": 1, "trained": 21, "skipped": 1.0, "beta": 0.0, "noise_level": 0.0}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name):
            SPOConfig(**{name: value})
