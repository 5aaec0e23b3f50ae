"""MaPO: the table of phi and its slope, the margin at equality, batches."""

from __future__ import annotations

import math

import pytest
import torch
from gradients import affine_gradient

from retort.sampling.path import FLOW, VE
from retort.trainers.objectives.mapo import MaPO, MaPOConfig, phi
from retort.trainers.objectives.parts.contract import Batch, Draws

SHAPE = (1, 6, 6)


def _batch(count=8, first=0, same=False):
    draws = Draws(3, 0, tuple(range(first, first + count)))
    winner = 0.3 + 0.7 * draws.normal("winner", SHAPE)
    loser = winner if same else 0.7 * draws.normal("loser", SHAPE)
    return Batch(draws, SHAPE, None, latents=winner, columns={"loser": loser})


@pytest.mark.parametrize(
    ("error", "value"), [(1e-4, 0.99998), (0.01, 0.99750), (0.1, 0.97521), (0.5, 0.88020), (1.0, 0.77075), (0.0, 1.0)]
)
def test_phi(error, value):
    assert phi(torch.tensor(error), 0.5).item() == pytest.approx(value, abs=5e-6)


@pytest.mark.parametrize("error", [0.0, 1e-9, 1e-3, 0.19999, 0.2, 0.20001, 3.0, 159.0, 1e4, 1e30])
def test_phi_and_its_slope_have_no_hole(error):
    exact = torch.tensor(error, dtype=torch.float64)
    y = exact.item() * 0.5
    if y == 0:
        value, slope = 1.0, -0.25
    elif y > 700:
        value = slope = 0.0
    elif y < 1e-3:
        value, slope = 1 - y / 2 + y * y / 12, 0.5 * (-0.5 + y / 6)
    else:
        e = math.expm1(y)
        value, slope = y / e, 0.5 * (1 / e - y * math.exp(y) / e**2)
    leaf = torch.tensor(error, requires_grad=True)
    found = phi(leaf, 0.5)
    found.backward()
    assert found.item() == pytest.approx(value, rel=1e-5, abs=1e-30)
    assert leaf.grad.item() == pytest.approx(slope, rel=2e-5, abs=1e-30)


def test_small_errors_are_a_softer_dpo(affine):
    """T (phi_w - phi_l) is 250 (D_l - D_w) for small errors."""
    errors = torch.tensor([1e-4, 3e-4])
    assert (1000 * (phi(errors, 0.5)[0] - phi(errors, 0.5)[1])).item() == pytest.approx(250 * 2e-4, rel=2e-3)


def test_at_equality_the_margin_is_beta_log_two(affine, path):
    denoiser = affine(path, std=0.8)
    denoiser.set_affine("student", 0.2, 0.1)
    (loss,) = MaPO(MaPOConfig(beta=0.3), denoiser).losses(_batch(same=True), 0)
    assert loss.value.item() - loss.metrics["winner"].item() == pytest.approx(0.3 * math.log(2), rel=1e-4)


def test_at_equality_winner_and_loser_are_pushed_apart_equally():
    """d margin loss / d D_w = -d / d D_l = -beta T phi'(D) / 2."""
    winner, loser = (torch.tensor(0.4, requires_grad=True) for _ in range(2))
    margin = 1000 * (phi(winner, 0.5) - phi(loser, 0.5))
    (-torch.nn.functional.logsigmoid(margin)).backward()
    assert winner.grad.item() > 0 and winner.grad.item() == -loser.grad.item()


def test_gradient_is_the_finite_difference(affine, path):
    denoiser, batch = affine(path, mean=0.1, std=0.8), _batch()
    objective = MaPO(MaPOConfig(scale=3.0, beta=2.0), denoiser)

    def value(w, c):
        denoiser.set_affine("student", w, c)
        return next(iter(objective.losses(batch, 0))).value

    slope = affine_gradient(denoiser, value(0.2, -0.1))
    for k, (dw, dc) in enumerate(((1e-2, 0.0), (0.0, 1e-2))):
        measured = (value(0.2 + dw, -0.1 + dc) - value(0.2 - dw, -0.1 - dc)).item() / 2e-2
        assert slope[k].item() == pytest.approx(measured, rel=1e-2, abs=2e-4)


def test_only_the_student_is_asked(affine):
    denoiser, asked = affine(), []
    ask = denoiser.predict_x0
    denoiser.predict_x0 = lambda *a: asked.append(denoiser.adapters.current) or ask(*a)
    next(iter(MaPO(MaPOConfig(), denoiser).losses(_batch(), 0)))
    assert asked == ["student", "student"]


@pytest.mark.parametrize("kind", [VE, FLOW], ids=["VE", "FLOW"])
def test_a_batch_of_eight_is_eight_batches(affine, kind):
    denoiser = affine(kind)
    denoiser.set_affine("student", 0.2, 0.1)
    objective = MaPO(MaPOConfig(), denoiser)
    whole = affine_gradient(denoiser, next(iter(objective.losses(_batch(8), 0))).value)
    parts = sum(affine_gradient(denoiser, next(iter(objective.losses(_batch(1, i), 0))).value) for i in range(8)) / 8
    assert torch.allclose(whole, parts, rtol=1e-4)


def test_bad_settings_are_named():
    for field, value in {"beta": -1.0, "snr": 0.0, "scale": math.inf}.items():
        with pytest.raises(ValueError, match=field):
            MaPOConfig(**{field: value})
