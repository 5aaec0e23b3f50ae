"""SmPO: neutral pairs, its limit DPO, the noise that inversion finds and how fast inversion becomes exact."""

from __future__ import annotations

import math

import pytest
import torch

from retort.sampling.path import FLOW, VE, broadcast
from retort.sampling.schedule import DiscreteSchedule
from retort.sampling.standard import sample_heun
from retort.trainers.objectives.dpo import DPO, DPOConfig
from retort.trainers.objectives.parts.contract import Batch, Draws, alpha_sigma
from retort.trainers.objectives.smpo import SmPO, SmPOConfig

SHAPE = (1, 6, 6)
LORA = "blocks.0.affine.lora_A.weight"


def _batch(count=8, first=0, strength=1.0, shape=SHAPE):
    draws = Draws(3, 0, tuple(range(first, first + count)))
    columns = {"loser": draws.normal("loser", shape) * 0.7, "strength": torch.full((count,), strength)}
    return Batch(draws, shape, None, latents=0.3 + 0.7 * draws.normal("winner", shape), columns=columns)


def _gradient(denoiser, objective, batch):
    row = denoiser.adapters.parameters("student")[LORA]
    row.grad = None
    (loss,) = objective.losses(batch, 0)
    with denoiser.adapter("student"):
        loss.value.backward()
    return loss, row.grad[0].clone()


@pytest.mark.parametrize("steps", [0, 3])
def test_an_even_pair_teaches_nothing(affine, path, steps):
    denoiser = affine(path, std=0.8)
    denoiser.set_affine("student", 0.2, 0.1)
    objective = SmPO(SmPOConfig(inversion_steps=steps), denoiser)
    loss, slope = _gradient(denoiser, objective, _batch(strength=0.0))
    assert loss.value.item() == pytest.approx(math.log(2), abs=1e-7) and torch.equal(slope, torch.zeros(2))


def test_certain_labels_and_fresh_noise_are_dpo(affine, path):
    denoiser = affine(path, std=0.8)
    denoiser.set_affine("student", 0.2, 0.1)
    for labels in ("weight", "soft"):
        config = SmPOConfig(beta=7.0, gamma=1.0, inversion_steps=0, labels=labels)
        smooth, a = _gradient(denoiser, SmPO(config, denoiser), _batch(strength=math.inf))
        plain, b = _gradient(denoiser, DPO(DPOConfig(beta=7.0), denoiser), _batch())
        assert torch.equal(a, b) and torch.equal(smooth.value, plain.value)


def test_weight_is_the_papers(affine):
    """-log sigmoid(gamma (2p - 1) u), u DPO's argument."""
    denoiser = affine()
    denoiser.set_affine("student", 0.2, 0.1)
    config = SmPOConfig(beta=0.7, gamma=10.0, inversion_steps=0, temperature=2.0)
    p = 1 / (1 + math.exp(-0.6 / 2.0))
    smooth = _gradient(denoiser, SmPO(config, denoiser), _batch(strength=0.6))[1]
    plain = _gradient(denoiser, DPO(DPOConfig(beta=0.7 * 10 * (2 * p - 1)), denoiser), _batch())[1]
    assert torch.allclose(smooth, plain, rtol=1e-4)


def test_soft_labels_have_their_optimum_where_every_pair_is_content(affine, nodes, path):
    """Rewards k x: at the shift k / (gamma beta h^2) of the mean every pair has gamma u = log(p / (1 - p)) at once."""
    k, beta, gamma = 1.2, 50.0, 10.0
    denoiser = affine(path, mean=0.1, std=1.0)
    winner = torch.linspace(-1, 2, 7).view(-1, 1, 1, 1)
    loser = torch.linspace(1, -1, 7).view(-1, 1, 1, 1)
    columns = {"loser": loser, "strength": k * (winner - loser).flatten()}
    batch = Batch(nodes(7, {"level": torch.tensor(0.6)}), (1, 1, 1), None, latents=winner, columns=columns)
    config = SmPOConfig(beta=beta, gamma=gamma, labels="soft", inversion_steps=0)
    objective = SmPO(config, denoiser)
    sigma = objective.sigma(batch.draws)[:1]
    x0 = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    with denoiser.adapter(None):
        error = denoiser.predict_x0(path.add_noise(x0, sigma, 0 * x0), sigma.expand(2), None) - x0
    scale = sigma if path.kind != "VP" else sigma / (1 + sigma**2).sqrt()
    h = ((error[0] - error[1]).flatten() / scale).item()
    denoiser.set_affine("student", 0.0, scale.item() * k / (gamma * beta * h))
    slope = _gradient(denoiser, objective, batch)[1][1]
    denoiser.set_affine("student", 0.0, 0.0)
    start = _gradient(denoiser, objective, batch)[1][1]
    assert start < 0 and abs(slope) < 2e-3 * abs(start)


def test_tau_is_the_noise_that_was_put_in(affine, path):
    denoiser, batch = affine(path), _batch()
    sigma, noise = torch.linspace(0.1, 0.9, 8), batch.draws.normal("n", SHAPE)

    class Known(SmPO):
        def inverted(self, latents, sigma, cond):
            return denoiser.path.add_noise(latents, sigma, noise)

    found = Known(SmPOConfig(), denoiser).found_noise(batch.images, sigma, None)
    assert torch.allclose(found, noise, atol=1e-5)


def _exact(denoiser, x0, sigma):
    """The ODE's own answer on Gaussian data: standard scores are kept."""
    a, s = alpha_sigma(denoiser.path, sigma)
    a, s = broadcast(a, x0), broadcast(s, x0)
    x = a * denoiser.mean + (a**2 * denoiser.std**2 + s**2).sqrt() / denoiser.std * (x0 - denoiser.mean)
    return x / a if denoiser.path.kind == "VE" else x


def _fine(denoiser):
    """A denoiser whose schedule begins at practically no noise, so that only the steps make errors."""
    if denoiser.path.kind != "FLOW":
        denoiser.schedule = DiscreteSchedule("sqrt_linear", 1e-7, 0.02)
    denoiser.sigma_range = (float(denoiser.schedule.sigmas[0]), denoiser.sigma_range[1])
    return denoiser


@pytest.mark.parametrize(("renoise", "order"), [(True, 2), (False, 1)])
def test_order_of_the_inversion(affine, path, renoise, order):
    denoiser = _fine(affine(path, mean=0.3, std=0.8))
    x0 = torch.linspace(-1.5, 2.0, 36).view(1, *SHAPE)
    sigma = denoiser.schedule.sigma(torch.tensor([500.0]))
    errors = []
    for steps in (8, 16, 32):
        objective = SmPO(SmPOConfig(inversion_steps=steps, renoise=renoise), denoiser)
        errors.append((objective.inverted(x0, sigma, None) - _exact(denoiser, x0, sigma)).abs().max().item())
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize(("renoise", "order"), [(True, 2), (False, 1)])
def test_sampling_returns_what_was_inverted(affine, path, renoise, order):
    """Down a grid so fine, by DDIM's second-order sibling, that what is missing is the inversion's own error."""
    denoiser = _fine(affine(path, mean=0.3, std=0.8))
    x0 = torch.linspace(-1.5, 2.0, 36).view(1, *SHAPE)
    sigma = denoiser.schedule.sigma(torch.tensor([500.0]))
    fine = SmPO(SmPOConfig(inversion_steps=500), denoiser)
    down = torch.cat(fine._grid(sigma)[::-1])
    errors = []
    for steps in (4, 8):
        objective = SmPO(SmPOConfig(inversion_steps=steps, renoise=renoise), denoiser)
        x = objective.inverted(x0, sigma, None)
        with denoiser.adapter(None):
            x = sample_heun(lambda x, s: denoiser.predict_x0(x, s, None), x, down, disable=True, path=path)
        errors.append((x - x0).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.4)


def test_inversion_ends_at_its_level_and_asks_the_student_twice_a_step(affine, path):
    denoiser, asked = affine(path), []
    ask = denoiser.predict_x0
    denoiser.predict_x0 = lambda x, s, c: asked.append((denoiser.adapters.current, float(s[0]))) or ask(x, s, c)
    sigma = denoiser.schedule.sigma(torch.tensor([333.3]))
    SmPO(SmPOConfig(inversion_steps=4), denoiser).inverted(torch.ones(1, *SHAPE), sigma, None)
    assert len(asked) == 8 and {who for who, _ in asked} == {"student"}
    assert asked[-1][1] == float(sigma) and asked[0][1] == pytest.approx(denoiser.sigma_range[0])
    levels = [level for _, level in asked]
    assert levels == sorted(levels)


@pytest.mark.parametrize("kind", [VE, FLOW], ids=["VE", "FLOW"])
def test_a_batch_of_eight_is_eight_batches(affine, kind):
    denoiser = affine(kind)
    denoiser.set_affine("student", 0.2, 0.1)
    objective = SmPO(SmPOConfig(beta=0.5, inversion_steps=3), denoiser)
    whole = _gradient(denoiser, objective, _batch(8))[1]
    parts = sum(_gradient(denoiser, objective, _batch(1, i))[1] for i in range(8)) / 8
    assert torch.allclose(whole, parts, rtol=1e-4)


def test_the_gradient_prefers_the_winner(affine, path):
    """A step along it raises the winner's error less than the loser's, more than the reference does."""
    denoiser = affine(path, std=0.8)
    objective = SmPO(SmPOConfig(beta=1.0), denoiser)
    denoiser.set_affine("student", 0.0, 0.0)
    loss, slope = _gradient(denoiser, objective, _batch(32))
    # Small, since the noise that is found moves with the student.
    denoiser.set_affine("student", *(-1e-2 * slope / slope.norm()))
    (after,) = objective.losses(_batch(32), 0)
    assert after.value < loss.value and after.metrics["margin"] > 0 == loss.metrics["margin"]


def test_bad_settings_are_named():
    bad = {"beta": 0.0, "gamma": -1.0, "labels": "hard", "temperature": 0.0, "inversion_steps": -1}
    for field, value in bad.items():
        with pytest.raises(ValueError, match=field):
            SmPOConfig(**{field: value})
