"""Flow-GRPO: densities, ratios and gradients in closed form on an affine denoiser."""

from __future__ import annotations

import math

import pytest
import torch

from retort.sampling.path import FLOW, VE, NoisePath
from retort.trainers.objectives.flow_grpo import FlowGRPO, FlowGRPOConfig, advantages, clipped, log_density
from retort.trainers.objectives.parts.contract import Batch, Draws

LEVELS = [0.9, 0.6, 0.3]
SHAPE = (1, 3, 3)
ROW = "blocks.0.affine.lora_A.weight"


def _mean(x, prompts, batch):
    return x.flatten(1).mean(1)


def _setting(affine, path=FLOW, **config):
    denoiser = affine(path, LEVELS, 0.4, 0.8)
    objective = FlowGRPO(FlowGRPOConfig(**{"steps": 3, "cfg": 1.0, "group": 4, "kl": 0.0, **config}), denoiser)
    objective.sigmas = torch.tensor([*LEVELS, 0.0])
    objective.reward = _mean
    denoiser.set_affine("student", 0.1, -0.2)
    batch = Batch(Draws(5, 0, (0, 1)), SHAPE, None, prompts=("a", "b"))
    objective.prepare([batch])
    return objective, batch


def _gradient(objective, batch, step=0):
    """(dL / d affine row (6,), losses) by the production path."""
    row = objective.denoiser.adapters.parameters("student")[ROW]
    row.grad, found = None, []
    for loss in objective.losses(batch, step):
        assert objective.denoiser.adapters.current is None
        with objective.denoiser.adapter("student"):
            loss.value.backward()
        found.append(loss)
    return row.grad[0].clone(), found


def test_density_of_the_step_is_the_normals(affine):
    objective, batch = _setting(affine)
    latents, densities = objective.trajectories(batch)[1]
    for index in (0, 1):
        t, dt, a = LEVELS[index], LEVELS[index + 1] - LEVELS[index], 0.7
        x, after = latents[index], latents[index + 1]
        with torch.no_grad(), objective.denoiser.adapter("student"):
            v = (x - objective.denoiser.predict_x0(x, torch.full((2,), t), None)) / t
        s = a * math.sqrt(t / (1 - t))
        mean = x * (1 + s**2 / (2 * t) * dt) + v * (1 + s**2 * (1 - t) / (2 * t)) * dt
        law = torch.distributions.Normal(mean, s * math.sqrt(-dt))
        assert torch.allclose(densities[index], law.log_prob(after).flatten(1).mean(1), atol=1e-4)
    one = torch.full((1, 1, 1, 1), 0.5)
    assert log_density(one * 3, one, one) == pytest.approx(-2 - math.log(0.5) - 0.5 * math.log(2 * math.pi), abs=1e-6)


def test_ratio_is_one_before_the_student_moves_and_its_own_after(affine):
    objective, batch = _setting(affine)
    _, losses = _gradient(objective, batch)
    assert all(float(loss.metrics["moved"]) == 0 for loss in losses)
    # The second update of two: trajectories are still the old policy's.
    before, _ = objective.trajectories(batch)[0]
    objective.after_step({}, 0)
    objective.denoiser.set_affine("student", 0.1, -0.25)
    again, _ = objective.trajectories(batch)[0]
    assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))
    _, losses = _gradient(objective, batch, 1)
    assert all(float(loss.metrics["moved"]) > 1e-5 for loss in losses)
    objective.after_step({}, 1)
    now, _ = objective.trajectories(batch)[0]
    assert not torch.equal(now[-1], before[-1])


@pytest.mark.parametrize("path", [FLOW, NoisePath("FLOW", 2.0)], ids=["plain", "scaled"])
def test_policy_gradient_is_its_closed_form(affine, path):
    objective, batch = _setting(affine, path)
    got, losses = _gradient(objective, batch)
    assert len(losses) == 4 * 2
    drawn = [latents for latents, _ in objective.trajectories(batch)]
    gains = advantages(torch.stack([_mean(latents[-1], None, None) for latents in drawn]))
    expected = torch.zeros(6)
    for k, latents in enumerate(drawn):
        for index in (0, 1):
            # d mean / d x0 of the SDE step, and the score (x' - mean) / std^2 = z / std.
            t, dt = LEVELS[index], LEVELS[index + 1] - LEVELS[index]
            s2 = 0.49 * t / (1 - t)
            slope = -(1 + s2 * (1 - t) / (2 * t)) * dt / t
            z = batch.draws.normal(f"step {index} of {k}", SHAPE)
            score = z / (path.noise_scale * math.sqrt(-dt * s2))
            for row, feature in ((index, latents[index]), (3 + index, torch.ones_like(z))):
                each = -gains[k] * (score * slope * feature).flatten(1).mean(1)
                expected[row] += each.mean() / 8
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-5)
    assert float(expected.abs().max()) > 0.01


def test_divergence_to_the_reference_and_its_gradient(affine):
    # With equal rewards nothing but the divergence pulls: (k c)^2 / (2 std^2), k = d mean / d x0, c the offset of x0.
    objective, batch = _setting(affine, kl=0.3)
    objective.reward = lambda x, prompts, batch: torch.full((len(x),), 0.1)
    objective.denoiser.set_affine("student", 0.0, -0.2)
    got, losses = _gradient(objective, batch)
    slopes = []
    for index in (0, 1):
        t, dt = LEVELS[index], LEVELS[index + 1] - LEVELS[index]
        s2 = 0.49 * t / (1 - t)
        slopes.append(((1 + s2 * (1 - t) / (2 * t)) * dt / t) ** 2 / (2 * -dt * s2))
    assert sum(float(loss.metrics["kl"]) for loss in losses) == pytest.approx(0.04 * sum(slopes) / 2, rel=1e-3)
    expected = [0.3 * slope * 2 * -0.2 / 2 for slope in slopes]
    assert got[3:5].tolist() == pytest.approx(expected, rel=1e-3)


def test_equal_rewards_teach_nothing(affine):
    objective, batch = _setting(affine, kl=0.05)
    objective.denoiser.set_affine("student", 0.0, 0.0)
    objective.reward = lambda x, prompts, batch: torch.full((len(x),), 0.1)
    got, _ = _gradient(objective, batch)
    assert float(got.abs().max()) == 0


def test_advantages_add_up_to_zero():
    rewards = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 3 + 20
    rewards[:, 2] = 0.1
    found = advantages(rewards)
    assert torch.allclose(found.sum(0), torch.zeros(5), atol=1e-5)
    assert torch.allclose(found[:, [0, 1, 3, 4]].std(0), torch.ones(4), atol=1e-4)
    assert float(found[:, 2].abs().max()) == 0
    assert torch.allclose(advantages(rewards * 7 + 3), found, atol=1e-4)


def test_clip_ends_the_gradient_only_where_the_ratio_went_the_wished_way():
    ratio = torch.tensor([0.9, 1.0, 1.1, 0.9, 1.0, 1.1], requires_grad=True)
    gain = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    (slope,) = torch.autograd.grad(clipped(ratio, gain, 0.05).sum(), ratio)
    assert slope[[0, 2, 3, 5]].tolist() == [-2.0, 0.0, 0.0, 2.0]


def test_a_batch_is_its_samples_and_a_subset_of_steps_is_drawn(affine):
    objective, batch = _setting(affine)
    whole, _ = _gradient(objective, batch)
    parts = []
    for i in (0, 1):
        alone = Batch(Draws(5, 0, (i,)), SHAPE, None, prompts=("a",))
        parts.append(_gradient(objective, alone)[0])
    assert torch.allclose(whole, sum(parts) / 2, rtol=1e-3, atol=1e-6)
    objective, batch = _setting(affine, trained=1)
    assert len(_gradient(objective, batch)[1]) == 4


def test_it_climbs(affine, play):
    objective, _ = _setting(affine, group=8, updates=1, clip=0.2)
    objective.reward = lambda x, prompts, batch: -(x - 1.5).square().flatten(1).mean(1)

    def batch_of(step):
        return Batch(Draws(0, step, tuple(range(8))), (1, 1, 1), None, prompts=("a",) * 8)

    history = play(objective, objective.denoiser, batch_of, 60, {"student": 0.02})
    first, last = (sum(step["reward"] for step in part) / 10 for part in (history[:10], history[-10:]))
    assert last > 0.6 * first > first


def test_other_models_and_bad_settings_are_named(affine):
    with pytest.raises(ValueError, match="predicts eps: choose spo"):
        FlowGRPO(FlowGRPOConfig(), affine(VE))
    bad = {"steps": 1, "group": 1, "trained": 10, "clip": 0.0, "kl": -1.0, "updates": 0, "noise_level": 0.0}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name):
            FlowGRPOConfig(**{name: value})
