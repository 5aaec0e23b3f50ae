"""DMD2 against closed forms: gradient, fixed point, guidance, two time scales, adapters, as production runs it."""

from __future__ import annotations

import pytest
import torch
from gradients import assert_same, gradients_with_gan
from one_level import FREE, MIDDLE, at, middle

from retort.sampling.path import FLOW, VE, NoisePath
from retort.trainers.objectives.dmd2 import DMD2, DMD2Config
from retort.trainers.objectives.parts.contract import Draws, alpha_sigma
from retort.trainers.objectives.parts.grids import student_sigmas
from retort.trainers.objectives.parts.score_matching import matching_loss


def backward(objective, batch, step=0, player="student") -> dict[str, float]:
    """All losses of a player run backwards as the loop does, and their metrics."""
    metrics = {}
    for loss in objective.losses(batch, step):
        if loss.player == player:
            with objective.denoiser.adapter(player):
                loss.value.backward()
            metrics |= {k: float(v) for k, v in loss.metrics.items()}
    return metrics


def expected_gradient(exact, quadrature, nodes, path, config, A, b, law=None, cond=None, uncond=None, **teacher):
    denoiser = exact(path, **teacher)
    denoiser.set_student(A, b)
    denoiser.law = law
    kind, z, noise = quadrature(DMD2)
    given = {"start": z, "matching noise": noise, "matching level": 0.0}
    backward(kind(config, denoiser), at(len(z), cond, uncond, nodes(len(z), given)))
    return denoiser, *denoiser.gradient()


# ---- what the student is told --------------------------------------------------------------


@pytest.mark.parametrize(("A", "b"), [(1.4, 0.2), (0.7, 1.5), (-0.5, 2.0)])
def test_the_gradient_is_the_closed_form(exact, quadrature, nodes, path, A, b):
    config = DMD2Config(**FREE, **MIDDLE)
    denoiser, dA, db = expected_gradient(exact, quadrature, nodes, path, config, A, b, mean=1.5, std=0.7)
    a, s = middle(denoiser)
    p, q = a**2 * 0.49 + s**2, a**2 * A**2 + s**2
    assert db == pytest.approx((b - 1.5) * s**2 / p, abs=2e-5)
    assert dA == pytest.approx(a**2 * A * s**2 * (A**2 - 0.49) / (q * p), abs=2e-5)


def test_holds_behind_a_scaled_flow_noise(exact, quadrature, nodes):
    denoiser, dA, db = expected_gradient(
        exact, quadrature, nodes, NoisePath("FLOW", 2.0), DMD2Config(**FREE, **MIDDLE), 1.4, 0.2, mean=1.5, std=0.7
    )
    a, s = middle(denoiser)
    assert s == pytest.approx(1.0, abs=2e-3)
    p, q = a**2 * 0.49 + s**2, a**2 * 1.96 + s**2
    assert db == pytest.approx((0.2 - 1.5) * s**2 / p, abs=2e-5)
    assert dA == pytest.approx(a**2 * 1.4 * s**2 * (1.96 - 0.49) / (q * p), abs=2e-5)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_fixed_point_is_the_teacher(exact, quadrature, nodes, path, normalise):
    config = DMD2Config(normalise=normalise, cfg=1.0, **MIDDLE)
    _, dA, db = expected_gradient(exact, quadrature, nodes, path, config, 0.7, 1.5, mean=1.5, std=0.7)
    assert abs(dA) < 1e-5
    assert abs(db) < 1e-5


class FourLevels(Draws):
    """Levels at four places only, so that an affine network with those levels is exact."""

    def uniform(self, name, low=0.0, high=1.0):
        u = super().uniform(name)
        return low + (high - low) * ((4 * u).floor() + 0.5) / 4


@pytest.mark.parametrize(("path", "cfg", "goal"), [(FLOW, 1.0, 1.5), (VE, 3.0, 3.5)], ids=["FLOW", "VE-guided"])
def test_training_ends_at_the_teacher_with_a_fake_score_that_learns(affine, play, path, cfg, goal):
    plain = affine(path)
    levels = plain.levels.drawn(torch.tensor([0.125, 0.375, 0.625, 0.875]))
    levels = sorted([*levels.tolist(), float(student_sigmas(plain, 1)[0])])
    denoiser = affine(path, levels, mean=0.0, std=0.7)
    objective = DMD2(DMD2Config(cfg=cfg, ratio=3, fake_rate=4.0, low=0.0, high=1.0), denoiser)

    def batch(step):
        return at(4, 1.5, 0.5, FourLevels(1, step, (0, 1, 2, 3)), shape=(1, 1, 500))

    play(objective, denoiser, batch, 600, {"student": 0.02, "fake": 0.02}, lambda p: min(1.0, 2 * (1 - p)))
    with denoiser.adapter("student"), torch.no_grad():
        x = objective.sample(Draws(2, 0, (0,)).normal("test", (1, 1, 200000)), {"mean": torch.full((1,), 1.5)}, None)
    assert float(x.mean()) == pytest.approx(goal, abs=0.03)
    assert float(x.std()) == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("decoupled", [False, True])
def test_guidance_is_the_teachers_alone(exact, quadrature, nodes, path, decoupled):
    # Two levels of the decoupled form coincide here, so both have the gradient towards mu_u + w (mu_c - mu_u).
    config = DMD2Config(normalise=False, cfg=3.0, decoupled=decoupled, **MIDDLE)
    calls = []
    kind, z, noise = quadrature(DMD2)
    denoiser = exact(path, std=0.7)
    denoiser.set_student(1.4, 0.2)
    told = denoiser.predict_x0

    def watched(x, sigma, cond):
        calls.append((denoiser.adapters.current, float(cond["mean"][0])))
        return told(x, sigma, cond)

    denoiser.predict_x0 = watched
    given = {"start": z, "matching noise": noise, "matching level": 0.0}
    given |= {"guidance level": 0.0, "guidance noise": noise}
    objective = kind(config, denoiser)
    backward(objective, at(len(z), 1.5, 0.5, nodes(len(z), given)))
    a, s = middle(denoiser)
    dA, db = denoiser.gradient()
    p, q = a**2 * 0.49 + s**2, a**2 * 1.96 + s**2
    if not decoupled or path.kind == "FLOW":
        # On VE and VP the student's own level is t = 399, so guidance is taken there instead.
        assert db == pytest.approx((0.2 - 3.5) * s**2 / p, abs=1e-4)
    else:
        a9, s9 = (float(v) for v in alpha_sigma(path, objective.sigmas[:1]))
        low = float(-2 * s9**2 / (a9**2 * 0.49 + s9**2))
        assert db == pytest.approx((0.2 - 1.5) * s**2 / p + low, abs=1e-4)
    assert dA == pytest.approx(a**2 * 1.4 * s**2 * (1.96 - 0.49) / (q * p), abs=1e-4)
    assert {mean for name, mean in calls if name == "fake"} == {1.5}
    assert {mean for name, mean in calls if name is None} == {1.5, 0.5}
    assert {mean for name, mean in calls if name == "student"} == {1.5}


def test_the_surrogate_has_the_gradient_it_says():
    x, g = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 4, dtype=torch.float64)
    matching_loss(x, g).backward()
    torch.testing.assert_close(x.grad, g / x.numel(), rtol=1e-12, atol=0)


def test_the_normaliser_is_the_guided_teachers_distance_of_each_sample(exact, nodes):
    denoiser = exact(VE, std=0.7)
    denoiser.set_student(1.4, 0.2)
    plain, scaled = (DMD2(DMD2Config(normalise=n, cfg=3.0), denoiser) for n in (False, True))
    x, batch = torch.randn(3, 1, 4, 4), at(3, 1.5, 0.5, Draws(0, 0, (0, 1, 2)), shape=(1, 4, 4))
    g, h = (o._gradient(batch, x, 1.0)[0] for o in (plain, scaled))
    draws = batch.draws
    sigma = denoiser.levels.drawn(draws.uniform("matching level"), 0.02, 0.98)
    x_t = denoiser.path.add_noise(x, sigma, draws.normal("matching noise", (1, 4, 4)))
    c, u = (denoiser.predict_x0(x_t, sigma, cond) for cond in (batch.cond, batch.uncond))
    distance = (x - (u + 3 * (c - u))).abs().flatten(1).mean(1)
    torch.testing.assert_close(h, g / distance.view(3, 1, 1, 1))


def test_a_sample_without_any_distance_has_no_gradient(exact):
    objective = DMD2(DMD2Config(cfg=1.0), exact(VE))
    x = torch.ones(2, 1, 2, 2)
    assert torch.equal(objective._normalised(torch.zeros_like(x), x, x), torch.zeros_like(x))
    assert torch.equal(objective._normalised(torch.ones_like(x), x, x), torch.zeros_like(x))


# ---- two time scales ------------------------------------------------------------------------------


@pytest.mark.parametrize(("lag", "settles"), [(5, True), (25, True), (250, False)])
def test_a_fake_score_that_lags(exact, play, lag, settles):
    denoiser = exact(VE, mean=1.5, std=0.7)
    denoiser.set_student(1.4, 0.2)
    denoiser.law = (1.4, 0.2)
    objective = DMD2(DMD2Config(cfg=1.0, normalise=False, ratio=1), denoiser)

    def batch(step):
        denoiser.law = tuple(f + (s - f) / lag for f, s in zip(denoiser.law, denoiser.student(), strict=True))
        return at(2, draws=Draws(0, step, (0, 1)), shape=(1, 1, 500))

    play(objective, denoiser, batch, 300, {"student": 0.02, "fake": 0.0}, lambda p: min(1.0, 2 * (1 - p)))
    A, b = denoiser.student()
    error = max(abs(abs(A) - 0.7), abs(b - 1.5))
    assert (error < 0.03) if settles else (error > 0.05), (A, b)


# ---- adapters -------------------------------------------------------------------------------------


def test_while_the_fake_score_is_the_teacher_only_guidance_moves_the_student(tiny):
    denoiser = tiny()
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    batch = at(2, 1.0, 0.0, Draws(0, 0, (0, 1)), shape=(3, 4, 4))
    g, metrics = DMD2(DMD2Config(cfg=1.0), denoiser)._gradient(batch, x, 1.0)
    assert torch.equal(g, torch.zeros_like(g))
    assert float(metrics["matching_norm"]) == 0
    g, _ = DMD2(DMD2Config(cfg=3.0, normalise=False), denoiser)._gradient(batch, x, 1.0)
    sigma = denoiser.levels.drawn(batch.draws.uniform("matching level"), 0.02, 0.98)
    x_t = denoiser.path.add_noise(x, sigma, batch.draws.normal("matching noise", (3, 4, 4)))
    c, u = (denoiser.predict_x0(x_t, sigma, cond) for cond in (batch.cond, batch.uncond))
    assert torch.equal(g, -(2.0 * (c - u)))


@pytest.mark.parametrize("gan_on", ["teacher", "fake"])
def test_gradients_with_checkpoints_are_those_without(tiny, gan_on):
    found = []
    for checkpoints in (False, True):
        denoiser = tiny()
        objective = DMD2(DMD2Config(steps=4, gan_weight=0.5, gan_on=gan_on, regression_weight=0.5), denoiser)
        columns = {f"pair_{k}": torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(7)) for k in
                   ("noise", "target")}  # fmt: skip
        batch = at(2, 1.0, 0.0, Draws(3, 0, (0, 1)), shape=(3, 4, 4), latents=columns["pair_target"], columns=columns)
        found.append(gradients_with_gan(denoiser, objective, batch, checkpoints))
    assert_same(found[1], found[0])
