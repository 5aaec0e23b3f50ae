"""Diffusion-DPO: its value and gradient at the reference, the optimum on Gaussian data, batches, bad data."""

from __future__ import annotations

import math

import pytest
import torch
from gradients import affine_gradient

from retort.sampling.path import FLOW, VE
from retort.trainers import checkpointing
from retort.trainers.objectives.dpo import DPO, DPOConfig
from retort.trainers.objectives.parts.contract import Batch, Draws, alpha_sigma
from retort.trainers.objectives.parts.preference import soft_loss

SHAPE = (1, 6, 6)


def pair_batch(count=8, first=0, shape=SHAPE, seed=3, strength=1.0):
    """Winners about 0.3 above losers, with some the other way round."""
    draws = Draws(seed, 0, tuple(range(first, first + count)))
    columns = {"loser": draws.normal("loser", shape) * 0.7, "strength": torch.full((count,), strength)}
    return Batch(draws, shape, None, latents=0.3 + 0.7 * draws.normal("winner", shape), columns=columns)


def one_level(batch, nodes, t, count):
    """The batch with every level at quantile t of the schedule and noise from a plain generator."""
    return Batch(
        nodes(count, {"level": torch.tensor(1 - t)}), batch.shape, None, None, batch.latents, (), batch.columns
    )


def the_loss(objective, batch):
    """The only loss of a step."""
    (loss,) = objective.losses(batch, 0)
    return loss


def test_at_the_reference_it_is_log_two(affine, path):
    denoiser, batch = affine(path, mean=0.1, std=0.8), pair_batch()
    denoiser.set_affine("student", 0.0, 0.0)
    loss = the_loss(DPO(DPOConfig(beta=37.0), denoiser), batch)
    assert loss.value.item() == pytest.approx(math.log(2), abs=1e-7)
    assert loss.metrics["accuracy"] == 0 and loss.metrics["margin"] == 0


def test_gradient_at_the_reference_is_a_quarter_beta_of_the_errors_difference(affine, path):
    denoiser, batch, beta = affine(path, mean=0.1, std=0.8), pair_batch(), 37.0
    denoiser.set_affine("student", 0.0, 0.0)
    objective = DPO(DPOConfig(beta=beta), denoiser)
    found = affine_gradient(denoiser, the_loss(objective, batch).value)
    sigma, noise = objective.sigma(batch.draws), batch.draws.normal("noise", SHAPE)
    with denoiser.adapter("student"):
        pair = batch.images, batch.columns["loser"]
        winner, loser = objective.errors(pair, sigma, (noise, noise), None)
        difference = (winner - loser).mean()
    expected = beta / 4 * affine_gradient(denoiser, difference)
    assert torch.allclose(found, expected, rtol=1e-4) and found.abs().min() > 0.01


def test_the_error_is_of_the_networks_own_output(affine, path):
    denoiser, batch = affine(path, mean=0.1, std=0.8), pair_batch()
    denoiser.set_affine("student", 0.3, -0.2)
    objective = DPO(DPOConfig(), denoiser)
    sigma = torch.full((8,), 0.5)
    noise = batch.draws.normal("noise", SHAPE)
    x = path.add_noise(batch.images, sigma, noise)
    with denoiser.adapter("student"):
        found, _ = objective.errors((batch.images, batch.images), sigma, (noise, noise), None)
        x0 = denoiser.predict_x0(x, sigma, None)
    if path.kind == "VE":
        error = (x - x0) / 0.5 - noise
    elif path.kind == "FLOW":
        error = (x - x0) / 0.5 - (noise - batch.images)
    else:
        a, s = alpha_sigma(path, sigma[0])
        error = (a * x - x0) / s - (a * noise - s * batch.images)
    assert torch.allclose(found, error.square().mean((1, 2, 3)), rtol=1e-4)


def test_gradient_is_the_finite_difference(affine, path):
    denoiser, batch = affine(path, mean=0.1, std=0.8), pair_batch()
    objective = DPO(DPOConfig(beta=3.0, flipped=0.1), denoiser)
    denoiser.set_affine("student", 0.2, -0.1)
    slope = affine_gradient(denoiser, the_loss(objective, batch).value)
    for k, (dw, dc) in enumerate(((1e-2, 0.0), (0.0, 1e-2))):
        values = []
        for sign in (1, -1):
            denoiser.set_affine("student", 0.2 + sign * dw, -0.1 + sign * dc)
            values.append(the_loss(objective, batch).value.item())
        assert slope[k].item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=5e-3, abs=1e-4)


def response(denoiser, objective, sigma):
    """(h, scale): how much the native error falls as x0 rises, at level sigma (1,), and the native scale."""
    noise, a, b = torch.zeros(1, *SHAPE), torch.zeros(1, *SHAPE), torch.ones(1, *SHAPE)
    path, scale = denoiser.path, denoiser.parametrisation.scale(sigma)
    with denoiser.adapter(None):
        errors = [
            (denoiser.predict_x0(path.add_noise(x0, sigma, noise), sigma, None) - x0)[0, 0, 0, 0] for x0 in (a, b)
        ]
    return float(errors[0] - errors[1]) / float(scale), float(scale)


def test_optimum_on_gaussian_data(affine, nodes, path):
    k, beta, count = 1.2, 500.0, 2**18
    denoiser = affine(path, mean=0.1, std=1.0)
    objective = DPO(DPOConfig(beta=beta), denoiser)
    # Evenly spread draws, so that the pairs are few and yet as good as an expectation.
    even = torch.quasirandom.SobolEngine(3, scramble=True, seed=0).draw(count, dtype=torch.float64)
    x = (0.1 + torch.special.ndtri(even[:, :2].T)).float()
    first = even[:, 2] < torch.sigmoid(k * (x[0] - x[1]))
    winner, loser = torch.where(first, x[0], x[1]), torch.where(first, x[1], x[0])
    batch = Batch(
        None, (1, 1, 1), None, latents=winner.view(-1, 1, 1, 1), columns={"loser": loser.view(-1, 1, 1, 1)}
    )  # fmt: skip
    batch = one_level(batch, nodes, 0.4, count)
    h, scale = response(denoiser, objective, objective.sigma(batch.draws)[:1])
    # A shift c of x0 is an error c / scale of the output, which a mean shifted by m makes where c = scale h m.
    shift = scale * h * k / (beta * h**2)

    def slope(c):
        denoiser.set_affine("student", 0.0, c)
        return affine_gradient(denoiser, the_loss(objective, batch).value)[1].item()

    low, high = 0.9 * shift, 1.1 * shift
    below, above = slope(low), slope(high)
    assert below < 0 < above
    assert low - below * (high - low) / (above - below) == pytest.approx(shift, rel=0.01)


def test_example_of_the_closed_form(affine, nodes):
    """s = 1, abar = 0.64, k = 1.2, beta = 500: the mean moves by 0.0104167."""
    denoiser = affine(VE)
    sigma = torch.tensor([0.75])  # 0.6 / 0.8
    h, _ = response(denoiser, DPO(DPOConfig(), denoiser), sigma)
    assert 1.2 / (500 * h**2) == pytest.approx(0.0104167, rel=1e-4)


def test_flipped_labels_give_a_finite_minimum():
    u = torch.linspace(-8, 8, 1601)
    assert u[soft_loss(u, 0.9).argmin()].item() == pytest.approx(math.log(9), abs=0.01)
    assert torch.allclose(soft_loss(u, 1.0), torch.nn.functional.softplus(-u))


@pytest.mark.parametrize("kind", [VE, FLOW], ids=["VE", "FLOW"])
def test_a_batch_of_eight_is_eight_batches(affine, kind):
    denoiser = affine(kind)
    denoiser.set_affine("student", 0.2, 0.1)
    objective = DPO(DPOConfig(beta=2.0), denoiser)
    whole = affine_gradient(denoiser, the_loss(objective, pair_batch(8)).value)
    parts = sum(affine_gradient(denoiser, the_loss(objective, pair_batch(1, first=i)).value) for i in range(8)) / 8
    assert torch.allclose(whole, parts, rtol=1e-4)


def test_checkpointing_changes_no_gradient(tiny, path):
    denoiser = tiny(path)
    objective = DPO(DPOConfig(beta=5.0), denoiser)
    draws = Draws(4, 0, (0, 1, 2))
    batch = Batch(
        draws, (3, 4, 4), {"mean": torch.tensor([0.2, 0.5, 0.9])}, None, draws.normal("w", (3, 4, 4)),
        columns={"loser": draws.normal("l", (3, 4, 4))},
    )  # fmt: skip

    def gradients():
        with denoiser.adapter("student"):
            the_loss(objective, batch).value.backward()
        found = {k: p.grad for k, p in denoiser.adapters.parameters("student").items()}
        for p in denoiser.adapters.parameters("student").values():
            p.grad = None
        return found

    before = gradients()
    checkpointing.enable(denoiser.network)
    after = gradients()
    assert all(torch.allclose(after[key], before[key], rtol=1e-9, atol=0) for key in before)


def test_single_images_are_refused(affine):
    batch = pair_batch()
    batch.columns = {}
    with pytest.raises(ValueError, match="pairs"):
        DPO(DPOConfig(), affine()).prepare([batch])


def test_bad_settings_are_named():
    for field, value in {"beta": 0.0, "flipped": 0.5, "levels": "cosine", "steps": 0, "cfg": -1.0}.items():
        with pytest.raises(ValueError, match=field):
            DPOConfig(**{field: value})
