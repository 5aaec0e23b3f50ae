"""Importance sampling: chances and weights in closed form, no bias, and runs that do not depend on how they went."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from watchers import StopsAt

from retort.sampling.path import FLOW, VE
from retort.trainers import order
from retort.trainers.adapters import LoraConfig
from retort.trainers.config import RunConfig, TrainingConfig
from retort.trainers.data import Data
from retort.trainers.loop import Stopped, Trainer
from retort.trainers.methods import read_config
from retort.trainers.objectives.dpo import DPO, DPOConfig
from retort.trainers.objectives.few_shot import FewShot, FewShotConfig
from retort.trainers.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from retort.trainers.objectives.mapo import MaPO, MaPOConfig
from retort.trainers.objectives.parts.contract import LOSER, STRENGTH, Batch, Draws, Loss
from retort.trainers.objectives.parts.preference import SMALLEST
from retort.trainers.objectives.smpo import SmPO, SmPOConfig
from retort.trainers.order import BUCKETS, Order, chances, slope
from retort.trainers.processes import Alone

GRADIENTS = torch.tensor([[1.0, 2.0], [-3.0, 0.5], [6.0, -2.0], [0.1, 0.0], [2.0, 8.0]], dtype=torch.float64)


def images(count=12, shape=(1, 2, 2), seed=1):
    values = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    return Data([{"mean": torch.zeros(1)}] * count, latents=list(values))


def order_of(denoiser, data, **settings):
    return Order(denoiser, data, TrainingConfig(**{"importance": 0.5, "batch_size": 4, **settings}), Alone())


def test_chances_are_the_mixture():
    scores = torch.tensor([1.0, 1.0, 2.0, 4.0])
    assert chances(scores, 0.5).tolist() == [0.1875, 0.1875, 0.25, 0.375]
    assert chances(scores, 0.0).tolist() == [0.25] * 4 == chances(torch.zeros(4), 0.5).tolist()
    assert chances(scores, 1.0).tolist() == [0.125, 0.125, 0.25, 0.5]


@pytest.mark.parametrize("importance", [0.25, 0.5, 1.0])
def test_the_weighted_mean_has_no_bias_and_its_variance_is_the_closed_form(importance):
    sizes = GRADIENTS.norm(dim=1)
    p = chances(sizes, importance)
    weighted = GRADIENTS / (len(p) * p)[:, None]
    mean = GRADIENTS.mean(0)
    torch.testing.assert_close((p[:, None] * weighted).sum(0), mean, rtol=1e-14, atol=1e-15)
    variance = float((p * weighted.square().sum(1)).sum() - mean.square().sum())
    uniform = float(sizes.square().mean() - mean.square().sum())
    assert variance < uniform
    if importance == 1.0:
        assert variance == pytest.approx(float(sizes.mean() ** 2 - mean.square().sum()), rel=1e-12)


def test_draws_follow_the_chances_and_carry_their_weights(affine, nodes, monkeypatch):
    data = images(4)
    made = order_of(affine(VE), data, batch_size=16)
    made.scores = torch.tensor([1.0, 1.0, 2.0, 4.0], dtype=torch.float64)
    line = (torch.arange(16) + 0.5) / 16
    monkeypatch.setattr(order, "Draws", lambda *_: nodes(16, {"importance": line}))
    rows, weights = made._chosen(0, range(16), 0)
    assert Counter(rows) == {0: 3, 1: 3, 2: 4, 3: 6}
    assert weights.tolist() == pytest.approx([4 / 3] * 6 + [1.0] * 4 + [2 / 3] * 6)
    # Over the line of all draws each sample counts alike, as in the plain set.
    counted = torch.zeros(4).index_add_(0, torch.tensor(rows), weights)
    torch.testing.assert_close(counted, torch.full((4,), 4.0))


def test_samples_that_are_repeated_are_as_likely_as_often_they_come(affine):
    data = images(3)
    data.repeat([1, 3, 1])
    made = order_of(affine(VE), data)
    assert data.candidates(0, 4, 0) == [0, 1, 1, 1, 2]
    drawn = [made._chosen(i, range(4 * i, 4 * i + 4), 0) for i in range(500)]
    counts = Counter(row for rows, _ in drawn for row in rows)
    assert counts[1] / 2000 == pytest.approx(0.6, abs=0.04)
    assert all(torch.equal(weights, torch.ones(4)) for _, weights in drawn)


def test_each_size_draws_among_its_own(affine):
    latents = [torch.zeros(1, 2, 2)] * 3 + [torch.zeros(1, 2, 4)] * 5
    data = Data([{"mean": torch.zeros(1)}] * 8, latents=latents)
    made = order_of(affine(VE), data, batch_size=2)
    plain = [{data.shape_of(i) for i in data.group(position, 2, 0)} for position in range(10)]
    for position, shape in enumerate(plain):
        (batch,) = made.batches(position, 1, position)
        assert {batch.shape} == shape == {data.shape_of(i) for i in made.rows}


def test_the_gradient_over_all_draws_is_the_plain_ones(affine, path):
    denoiser, data = affine(path, (0.5, 2.0)), images(5)
    denoiser.set_affine("student", [0.1, 0.3], [0.2, -0.4])
    objective = FlowMatching(FlowMatchingConfig(), denoiser)
    made = order_of(denoiser, data, batch_size=1)
    made.scores = torch.tensor([0.1, 3.0, 1.0, 0.4, 2.0], dtype=torch.float64)
    p = chances(made.scores, 0.5)

    def gradient(row, weighted):
        batch = data.batch(denoiser, [row], [row], 7, 0, 0.0)
        batch.weights = (1 / (5 * p[row])).float().view(1) if weighted else None
        made._seen = torch.zeros(2, 5)
        (loss,) = objective.losses(batch, 0)
        weights = list(denoiser.adapters.parameters("student").values())
        with denoiser.adapter("student"):
            return torch.cat([g.flatten() for g in torch.autograd.grad(made.weighted(loss, batch), weights)])

    expected = sum(float(p[i]) * gradient(i, True) for i in range(5))
    torch.testing.assert_close(expected, sum(gradient(i, False) for i in range(5)) / 5, rtol=1e-5, atol=1e-6)


OBJECTIVES = {
    "flow": (FlowMatching, FlowMatchingConfig(loss_space="x0")),
    "few_shot": (FewShot, FewShotConfig(consistency=0.0)),
    "dpo": (DPO, DPOConfig(beta=50.0)),
    "smpo": (SmPO, SmPOConfig(beta=5.0, inversion_steps=0)),
    "mapo": (MaPO, MaPOConfig()),
}


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_slope_is_the_gradient_by_the_networks_output(affine, path, kind):
    made, config = OBJECTIVES[kind]
    denoiser, generator = affine(path, (0.5, 2.0), std=0.8), torch.Generator().manual_seed(0)
    denoiser.set_affine("student", [0.1, 0.3], [0.2, -0.4])
    winner, loser = torch.randn(2, 6, 1, 3, 3, generator=generator)
    batch = Batch(Draws(3, 0, tuple(range(6))), (1, 3, 3), {"mean": torch.zeros(6)}, None, winner,
                  columns={LOSER: loser, STRENGTH: torch.linspace(0.5, 3, 6)})  # fmt: skip
    outputs, predict = [], denoiser.predict_x0

    def watched(x, sigma, cond):
        x0 = predict(x, sigma, cond)
        if x0.requires_grad:
            outputs.append(x0)
        return x0

    denoiser.predict_x0 = watched
    (loss,) = made(config, denoiser).losses(batch, 1)
    torch.testing.assert_close(loss.value, loss.each.mean())
    by = torch.autograd.grad(loss.each.sum(), outputs, retain_graph=True)
    norm = torch.cat([g.flatten(1) for g in by], 1).norm(dim=1)
    if kind != "flow":  # whose errors are of x0 there
        norm = norm * denoiser.parametrisation.scale(loss.sigma).clamp(min=SMALLEST)
    torch.testing.assert_close(2 / math.sqrt(9) * slope(loss), norm, rtol=1e-4, atol=1e-7)


def test_scores_are_running_means_over_what_is_usual_at_the_level(affine):
    made = order_of(affine(FLOW), images(4), batch_size=4)
    sigma = torch.tensor([0.1, 0.1, 0.9, 0.9])
    # At low noise every slope is ten times that at high noise; sample 1 and sample 3 have thrice their neighbour's.
    error = torch.tensor([10.0, 30.0, 1.0, 3.0]).square()
    made.batches(0, 1, 0)
    made.rows = [0, 1, 2, 3]
    batch = Batch(Draws(0, 0, (0, 1, 2, 3)), (1, 2, 2), None, weights=torch.ones(4))
    leaf = error.clone().requires_grad_()
    made.weighted(Loss("student", leaf.mean(), {}, leaf, (leaf,), sigma), batch)
    made.learn()
    # Half of an average sample, and half of what was seen.
    assert made.scores.tolist() == pytest.approx([0.75, 1.25, 0.75, 1.25])
    assert [float(v) for v in made.levels if v > 0] == [20.0, 2.0] and made.visits.tolist() == [2.0] * 4
    assert int((made.levels > 0).nonzero()[0]) == int(0.1 * BUCKETS)


def test_without_importance_nothing_is_weighed_kept_or_drawn_otherwise(affine):
    data, denoiser = images(), affine(VE)
    made = order_of(denoiser, data, importance=0.0, accumulation=2)
    batches = made.batches(3, 1, 5)
    assert made.rows == data.group(3, 8, 0) and all(batch.weights is None for batch in batches)
    loss = Loss("student", torch.tensor(3.0), {})
    assert made.weighted(loss, batches[0]) is loss.value and made.saved() == {}
    made.learn()
    assert made.scores.tolist() == [1.0] * 12


def test_a_loss_of_no_single_samples_is_refused(affine):
    made = order_of(affine(VE), images())
    (batch,) = made.batches(0, 1, 0)
    with pytest.raises(ValueError, match="importance: the loss of student is none of single samples"):
        made.weighted(Loss("student", torch.tensor(3.0), {}), batch)
    for name in ("slow_repeats", "importance"):
        with pytest.raises(ValueError, match=r"tdm does not learn from single images.*flow, few_shot, dpo, smpo, mapo"):
            read_config({"method": "tdm", "training": {name: {"slow_repeats": 2, "importance": 0.3}[name]}})
    with pytest.raises(ValueError, match=r"importance must be between 0 and 0\.5, got 0\.6"):
        TrainingConfig(importance=0.6)


@pytest.fixture
def run(affine, tmp_path):
    """run(folder, watcher, **settings) -> the LoRA of a small flow matching run with importance and slow repeats."""

    def train(folder, watcher=None, **settings):
        denoiser, data = affine(VE, (0.5, 2.0)), images()
        for i in range(3):
            data.latents[i].add_(4.0)
        given = {"steps": 10, "batch_size": 4, "warmup": 0, "learning_rate": 0.02, "preview_every": 0,
                 "importance": 0.5, "slow_repeats": 2, "slow_after": 4, "save_minutes": 0}  # fmt: skip
        config = RunConfig("flow", FlowMatchingConfig(), TrainingConfig(**given | settings), LoraConfig(rank=1))
        objective = FlowMatching(config.objective, denoiser)
        trainer = Trainer(denoiser, objective, data, config, tmp_path / folder, watcher)
        return trainer.train(), trainer

    return train


def same(a, b, **close):
    for key in a:
        torch.testing.assert_close(a[key], b[key], **close)


@pytest.mark.parametrize("at", [1, 6])
def test_a_resumed_run_is_the_uninterrupted_one(run, at):
    whole, trainer = run("whole")
    with pytest.raises(Stopped):
        run("parts", StopsAt(at))
    parts, second = run("parts")
    same(parts, whole, rtol=0, atol=0)
    assert torch.equal(second.order.scores, trainer.order.scores) and not torch.equal(
        second.order.scores, torch.ones(12).double()
    )


def test_eight_at_once_are_one_eight_times(run):
    whole, trainer = run("whole", batch_size=8)
    single, other = run("single", batch_size=1, accumulation=8)
    same(single, whole, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(other.order.scores, trainer.order.scores, rtol=1e-4, atol=1e-5)


def test_processes_learn_from_what_all_of_them_saw(affine):
    """Two processes that share a step note what one would, each its half."""
    data, denoiser = images(), affine(VE)
    objective = FlowMatching(FlowMatchingConfig(), denoiser)
    whole = order_of(denoiser, data)

    class Half(Alone):
        def __init__(self, rank):
            self.rank, self.world = rank, 2

    halves = [Order(denoiser, data, whole.settings, Half(rank)) for rank in range(2)]
    for made in (whole, *halves):
        for batch in made.batches(0, 1, 0):
            (loss,) = objective.losses(batch, 0)
            made.weighted(loss, batch)
    assert halves[0].rows == halves[1].rows == whole.rows
    torch.testing.assert_close(halves[0]._seen + halves[1]._seen, whole._seen)
