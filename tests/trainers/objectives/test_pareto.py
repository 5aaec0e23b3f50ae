"""The shortest combination of two gradients against a grid, and two rewards that end on their Pareto set."""

from __future__ import annotations

import pytest
import torch

from retort.sampling.path import FLOW, VE
from retort.trainers.objectives.align_prop import AlignProp, AlignPropConfig
from retort.trainers.objectives.parts.contract import Batch, Draws
from retort.trainers.objectives.parts.pareto import share


def _vector(seed, scale=1.0):
    return scale * torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0])
def test_it_is_the_shortest_of_all_combinations(scale):
    grid = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    for seed in range(6):
        a, b = _vector(seed), _vector(100 + seed, scale)
        lengths = (grid[:, None] * a.flatten() + (1 - grid[:, None]) * b.flatten()).square().sum(1)
        alpha = share(a[None], b[None])
        assert alpha.shape == (1,)
        assert float(alpha) == pytest.approx(float(grid[lengths.argmin()]), abs=1e-5)
        d = alpha * a + (1 - alpha) * b
        assert all(float((d * g).sum()) >= float(d.square().sum()) - 1e-9 for g in (a, b))


def test_plain_cases():
    x, y = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    first, second = torch.stack([x, x, x, x, 5 * x]), torch.stack([y, x, -x, 5 * x, x])
    # Each row is a sample of its own.
    assert share(first, second).tolist() == [0.5, 0.5, 0.5, 1.0, 0.0]
    assert share(first * 0, second * 0).tolist() == [0.5] * 5


@pytest.mark.parametrize("path", [VE, FLOW], ids=["VE", "FLOW"])
def test_two_quadratic_rewards_end_between_their_optima(affine, path):
    # One step from the top: x0 is the affine part's own. The one reward is far stronger, and a sum would end at it.
    denoiser = affine(path, [0.9], 0.0, 1.0)
    objective = AlignProp(AlignPropConfig(steps=1, cfg=1.0), denoiser)
    objective.sigmas = torch.tensor([0.9, 0.0])
    objective.reward = lambda x, prompts, batch: -100 * (x - 1).square().flatten(1).mean(1)
    objective.second = lambda x, prompts, batch: -(x - 2).square().flatten(1).mean(1)
    batch = Batch(Draws(0, 0, tuple(range(4))), (1, 2, 2), None, prompts=("a",) * 4)

    def slope(c):
        denoiser.set_affine("student", 0.0, c)
        row = denoiser.adapters.parameters("student")["blocks.0.affine.lora_A.weight"]
        row.grad = None
        (loss,) = objective.losses(batch, 0)
        with denoiser.adapter("student"):
            loss.value.backward()
        return float(row.grad[0, 1]), loss.metrics

    denoiser.set_affine("student", 0.0, 0.0)
    with torch.no_grad():
        spread = objective.simulate(batch, 1)
    # Outside both optima they agree on where to go, by the weaker pull alone.
    below, metrics = slope(-4.0 - float(spread.mean()))
    assert below == pytest.approx(-2 * 6, rel=1e-4) and float(metrics["share"]) == 0
    above, _ = slope(7.0 - float(spread.mean()))
    assert above == pytest.approx(2 * 5, rel=1e-4)
    assert {"reward", "reward_2", "reward_slope", "kept", "share"} == set(metrics)
    # Samples that are all alike: between the optima nothing moves.
    objective.simulate = lambda batch, kept: _same(denoiser, batch)
    assert slope(1.4)[0] == pytest.approx(0.0, abs=1e-5)
    assert slope(0.6)[0] == pytest.approx(-2 * 1.4, rel=1e-4)


def test_a_batch_with_two_rewards_is_its_samples(affine):
    denoiser = affine(VE, [0.9], 0.0, 1.0)
    objective = AlignProp(AlignPropConfig(steps=1, cfg=1.0), denoiser)
    objective.sigmas = torch.tensor([0.9, 0.0])
    objective.reward = lambda x, prompts, batch: -3 * (x - 1).square().flatten(1).mean(1)
    objective.second = lambda x, prompts, batch: -(x + 0.5).square().flatten(1).mean(1)
    denoiser.set_affine("student", 0.3, 0.2)
    row = denoiser.adapters.parameters("student")["blocks.0.affine.lora_A.weight"]
    found = []
    for indices in ((0, 1, 2, 3), (0,), (1,), (2,), (3,)):
        row.grad = None
        (loss,) = objective.losses(Batch(Draws(0, 0, indices), (1, 2, 2), None, prompts=("a",) * len(indices)), 0)
        with denoiser.adapter("student"):
            loss.value.backward()
        found.append(row.grad.clone())
    assert torch.allclose(found[0], sum(found[1:]) / 4, rtol=1e-4, atol=1e-6)


def _same(denoiser, batch):
    x = torch.zeros(len(batch), *batch.shape)
    with denoiser.adapter("student"):
        return denoiser.network(x, torch.full((len(batch),), 0.9))
