"""InstaRevive on the Gaussian line, whose student has closed forms.

x ~ N(0, S^2) is clean, y = x + n with n of variance tau^2 degraded, and the student is x = G y.
"""

from __future__ import annotations

import math

import pytest
import torch
from gradients import assert_same, gradients_with_gan
from scipy.optimize import brentq

from retort.sampling.path import FLOW, VE, broadcast
from retort.trainers.objectives.instarevive import InstaRevive, InstaReviveConfig
from retort.trainers.objectives.parts.contract import Batch, Draws, alpha_sigma, mean_each

S, TAU = 0.7, 0.5
V = S**2 + TAU**2
MIDDLE = {"low": 0.499, "narrow": 0.5, "high": 0.5}  # one level: t = 499, or 0.5 of a flow
FREE = {"normalise": False, "cfg": 1.0, "dynamic": False}
BOTH = pytest.mark.parametrize("path", [VE, FLOW], ids=["VE", "FLOW"])


def middle(denoiser) -> tuple[float, float]:
    sigma = denoiser.levels.drawn(torch.zeros(1), 0.499, 0.5)
    return tuple(float(v) for v in alpha_sigma(denoiser.path, sigma))


def matching(gain: float, levels) -> float:
    """dL/dG of the distribution's pull alone: E[(fake - real) y], averaged over levels (a, s)."""
    q = gain**2 * V
    each = [a**2 * gain * V * s**2 * (q - S**2) / ((a**2 * q + s**2) * (a**2 * S**2 + s**2)) for a, s in levels]
    return sum(each) / len(each)


def formula(weight: float, levels, pull: float = 1.0) -> float:
    """The student's G where both pulls balance."""
    return brentq(lambda g: pull * matching(g, levels) + weight * (g * V - S**2), 1e-3, 2.0)


def error(gain: float) -> float:
    return (gain - 1) ** 2 * S**2 + gain**2 * TAU**2


@pytest.fixture
def line(exact, nodes):
    """line(path, config) -> (objective whose student gradient is an expectation, its batch); y, noise and x on a grid.

    Given y, x is Gaussian, and two points have its mean and its variance, which is all that a square sees of it.
    """

    def make(path, config, points: int = 61, reach: float = 6.0):
        knots = torch.linspace(-reach, reach, points)
        weight = torch.distributions.Normal(0, 1).log_prob(knots).exp() * (knots[1] - knots[0])
        z, noise, side = (v.flatten() for v in torch.meshgrid(knots, knots, torch.tensor([-1.0, 1.0]), indexing="ij"))
        chance = (weight[:, None] * weight).repeat_interleave(2, 1).flatten() * points**2
        clean = S**2 / math.sqrt(V) * z + side * S * TAU / math.sqrt(V)

        class Expectation(InstaRevive):
            def _student(self, batch, call, g, metrics, x=None):
                return super()._student(batch, call, g * broadcast(chance, g), metrics, x)

        denoiser = exact(path, std=S)
        draws = nodes(len(z), {"matching noise": noise, "matching level": 0.0})
        shaped = {"latents": clean.view(-1, 1, 1, 1), "columns": {"degraded": (math.sqrt(V) * z).view(-1, 1, 1, 1)}}
        return Expectation(config, denoiser), Batch(draws=draws, shape=(1, 1, 1), cond=None, **shaped)

    return make


def set_gain(denoiser, gain: float) -> None:
    denoiser.set_affine("student", gain, 0.0)
    denoiser.law = (gain * math.sqrt(V), 0.0)


def gain_of(denoiser) -> float:
    down, up = denoiser.adapters.parameters("student").values()
    return float((up @ down)[0, 0])


def gradient(objective, batch) -> tuple[float, dict]:
    """dL/dG of the student's loss, and its metrics."""
    (loss,) = (one for one in objective.losses(batch, 0) if one.player == "student")
    with objective.denoiser.adapter("student"):
        loss.value.backward()
    weights = objective.denoiser.adapters.parameters("student")
    return float(weights["blocks.0.affine.lora_A.weight"].grad[0, 0]), loss.metrics


# ---- gradients ------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("gain", "pull", "weight"), [(1.2, 1.0, 0.0), (0.4, 2.0, 0.0), (1.2, 0.0, 1.5), (0.5, 1.0, 0.7)]
)
def test_the_gradient_is_the_closed_form(line, path, gain, pull, weight):
    config = InstaReviveConfig(matching_weight=pull, regression_weight=weight, **FREE, **MIDDLE)
    objective, batch = line(path, config)
    set_gain(objective.denoiser, gain)
    found, _ = gradient(objective, batch)
    expected = pull * matching(gain, [middle(objective.denoiser)]) + weight * (gain * V - S**2)
    assert found == pytest.approx(expected, abs=2e-5)


@BOTH
def test_a_feature_loss_of_squares_is_the_regression(line, path):
    shared = {"matching_weight": 0.0, **FREE, **MIDDLE}
    found = []
    for weights in ({"regression_weight": 0.8}, {"regression_weight": 0.0, "feature_weight": 0.8}):
        objective, batch = line(path, InstaReviveConfig(**weights, **shared))
        objective.features = lambda x, clean: 0.5 * mean_each((x - clean).square())
        set_gain(objective.denoiser, 1.1)
        found.append(gradient(objective, batch)[0])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@BOTH
def test_the_degraded_latent_is_the_networks_input_without_noise_or_scale(line, path):
    objective, batch = line(path, InstaReviveConfig(**FREE, **MIDDLE))
    set_gain(objective.denoiser, 1.0)
    degraded = batch.columns["degraded"]
    with objective.denoiser.adapter("student"):
        torch.testing.assert_close(objective.sample(degraded, None, None), degraded, rtol=1e-6, atol=1e-6)
    t = 400 if path is FLOW else float(objective.denoiser.schedule.timestep(objective.sigmas[0]))
    assert t == 400
    assert float(objective.sigmas[0]) == pytest.approx(0.4 if path is FLOW else 1.1644, abs=1e-3)


# ---- where training ends --------------------------------------------------------------------------


@BOTH
def test_the_sweep_ends_on_the_formulas(line, play, path):
    ends, errors = [], []
    for pull, weight in ((0.0, 1.0), (1.0, 1.0), (1.0, 0.1), (1.0, 0.0)):
        config = InstaReviveConfig(matching_weight=pull, regression_weight=weight, **FREE, **MIDDLE)
        objective, batch = line(path, config)
        denoiser = objective.denoiser
        set_gain(denoiser, 0.5 if pull else 1.3)

        def each(step, denoiser=denoiser, batch=batch):
            denoiser.law = (gain_of(denoiser) * math.sqrt(V), 0.0)
            return batch

        play(objective, denoiser, each, 100, {"student": 0.03, "fake": 0.0}, lambda p: 1 - p)
        ends.append(gain_of(denoiser))
        errors.append(error(ends[-1]))
        assert ends[-1] == pytest.approx(formula(weight, [middle(denoiser)], pull), rel=0.02)
    assert ends[0] == pytest.approx(S**2 / V, rel=0.02)
    assert errors[0] == pytest.approx(S**2 * TAU**2 / V, rel=0.02)
    assert ends[-1] == pytest.approx(S / math.sqrt(V), rel=0.02)
    assert errors[-1] == pytest.approx(2 * S**2 * (1 - S / math.sqrt(V)), rel=0.02)
    assert ends[-1] ** 2 * V == pytest.approx(S**2, rel=0.04)
    # Perception and distortion: the less regression, the wider the output and the larger its error.
    assert ends == sorted(ends)
    assert errors == sorted(errors)


class FourLevels(Draws):
    """Levels at four places only, so that an affine network with those levels is exact."""

    def uniform(self, name, low=0.0, high=1.0):
        u = super().uniform(name)
        return low + (high - low) * ((4 * u).floor() + 0.5) / 4


@BOTH
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_with_a_fake_score_that_learns(affine, play, path, weight):
    config = InstaReviveConfig(regression_weight=weight, ratio=2, fake_rate=4.0, low=0.0, narrow=0.5, high=1.0, **FREE)
    plain = affine(path)
    levels = plain.levels.drawn(torch.tensor([0.125, 0.375, 0.625, 0.875]))
    start = float(InstaRevive(config, plain).sigmas[0])
    denoiser = affine(path, sorted([*levels.tolist(), start]), std=S)
    objective = InstaRevive(config, denoiser)

    def batch(step):
        draws = FourLevels(1, step, (0, 1, 2, 3))
        clean = S * draws.normal("clean", (1, 1, 500))
        degraded = clean + TAU * draws.normal("degradation", (1, 1, 500))
        return Batch(draws=draws, shape=(1, 1, 500), cond=None, latents=clean, columns={"degraded": degraded})

    play(objective, denoiser, batch, 450, {"student": 0.02, "fake": 0.02}, lambda p: min(1.0, 2 * (1 - p)))
    with denoiser.adapter("student"), torch.no_grad():
        out = objective.sample(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1), None, None).flatten()
    places = [tuple(float(v) for v in pair) for pair in zip(*alpha_sigma(path, levels), strict=True)]
    assert float(out[1] - out[0]) / 2 == pytest.approx(formula(weight, places), rel=0.02)


# ---- dynamic control -----------------------------------------------------------------------------------


def test_scope_and_regression_follow_the_distance(exact):
    config = InstaReviveConfig(low=0.02, narrow=0.3, high=0.98, floor=0.25, memory=0.5)
    objective = InstaRevive(config, exact(VE))
    assert (objective.distance, objective.scope, objective.regression) == (1.0, (0.02, 0.98), 1.0)
    objective.after_step({"input_distance": 2.0, "distance": 1.0}, 0)
    assert objective.distance == pytest.approx(0.5)
    assert objective.scope == (0.02, pytest.approx(0.64))
    assert objective.regression == pytest.approx(0.625)
    objective.after_step({"input_distance": 2.0, "distance": 0.5}, 1)
    # Weights of 0.25 and 0.5: (0.25 * 1 + 0.5 * 0.5) over (0.75 * 2).
    assert objective.distance == pytest.approx(1 / 3)
    objective.after_step({"score_loss": 1.0}, 2)
    assert objective.distance == pytest.approx(1 / 3)
    resumed = InstaRevive(config, exact(VE))
    resumed.buffers()["distances"].copy_(objective.buffers()["distances"])
    assert resumed.distance == objective.distance
    for _ in range(40):
        objective.after_step({"input_distance": 1.0, "distance": 9.0}, 3)
    assert objective.distance == 1.0


def test_the_levels_compared_lie_within_the_scope(exact, nodes):
    config = InstaReviveConfig(cfg=1.0, low=0.02, narrow=0.3, high=0.98)
    objective = InstaRevive(config, exact(FLOW, std=S))
    objective.denoiser.set_student(0.8, 0.0)
    objective.after_step({"input_distance": 1.0, "distance": 0.25}, 0)
    seen, told = [], objective.denoiser.predict_x0

    def watched(x, sigma, cond):
        if objective.denoiser.adapters.current is None:
            seen.append(sigma)
        return told(x, sigma, cond)

    objective.denoiser.predict_x0 = watched
    draws = nodes(500, {"matching level": torch.linspace(0, 0.9999, 500)})
    latents = torch.zeros(500, 1, 1, 1)
    batch = Batch(draws=draws, shape=(1, 1, 1), cond=None, latents=latents, columns={"degraded": latents + 1})
    list(objective.losses(batch, 0))
    assert float(seen[0].min()) == pytest.approx(0.02, abs=1e-3)
    assert float(seen[0].max()) == pytest.approx(0.3 + 0.68 * 0.25, abs=1e-3)


@BOTH
def test_dynamic_control_ends_where_it_agrees_with_itself(exact, play, path):
    config = InstaReviveConfig(normalise=False, cfg=1.0, regression_weight=0.6, floor=0.0, **MIDDLE)
    denoiser = exact(path, std=S)
    set_gain(denoiser, 0.4)
    objective = InstaRevive(config, denoiser)

    def batch(step):
        denoiser.law = (gain_of(denoiser) * math.sqrt(V), 0.0)
        draws = Draws(3, step, (0, 1))
        clean = S * draws.normal("clean", (1, 1, 9000))
        degraded = clean + TAU * draws.normal("degradation", (1, 1, 9000))
        return Batch(draws=draws, shape=(1, 1, 9000), cond=None, latents=clean, columns={"degraded": degraded})

    play(objective, denoiser, batch, 300, {"student": 0.02, "fake": 0.0}, lambda p: 1 - p)
    levels = [middle(denoiser)]

    def balance(gain):
        share = min(1.0, error(gain) / TAU**2)
        return matching(gain, levels) + 0.6 * share * (gain * V - S**2)

    expected = brentq(balance, 1e-3, 2.0)
    assert gain_of(denoiser) == pytest.approx(expected, rel=0.007)
    assert objective.distance == pytest.approx(error(expected) / TAU**2, rel=0.02)
    # It is another point than that of the same weights without control.
    assert abs(expected / formula(0.6, levels) - 1) > 0.015


# ---- adapters -------------------------------------------------------------------------------------


def pictures(draws, **more) -> Batch:
    given = {k: torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i, k in
             enumerate(("clean", "degraded"))}  # fmt: skip
    conds = {k: {"mean": torch.full((2,), v)} for k, v in (("cond", 1.0), ("uncond", 0.0))}
    return Batch(draws, (3, 4, 4), latents=given["clean"], columns={"degraded": given["degraded"]}, **conds, **more)


def test_while_the_fake_score_is_the_teacher_only_guidance_and_regression_move_the_student(tiny):
    denoiser = tiny()
    batch = pictures(Draws(0, 0, (0, 1)))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    g, _ = InstaRevive(InstaReviveConfig(cfg=1.0), denoiser)._gradient(batch, x, 1.0)
    assert torch.equal(g, torch.zeros_like(g))
    alone = InstaRevive(InstaReviveConfig(cfg=1.0, regression_weight=0.0), denoiser)
    for loss in alone.losses(batch, 0):
        if loss.player == "student":
            assert float(loss.value.detach()) == 0
    g, _ = InstaRevive(InstaReviveConfig(cfg=3.0, normalise=False), denoiser)._gradient(batch, x, 1.0)
    sigma = denoiser.levels.drawn(batch.draws.uniform("matching level"), 0.02, 0.98)
    x_t = denoiser.path.add_noise(x, sigma, batch.draws.normal("matching noise", (3, 4, 4)))
    c, u = (denoiser.predict_x0(x_t, sigma, cond) for cond in (batch.cond, batch.uncond))
    assert torch.equal(g, -(2.0 * (c - u)))


@BOTH
def test_gradients_with_checkpoints_are_those_without(tiny, path):
    found = []
    for checkpoints in (False, True):
        denoiser = tiny(path)
        objective = InstaRevive(InstaReviveConfig(gan_weight=0.5, feature_weight=0.5), denoiser)
        objective.features = lambda x, clean: mean_each((x.tanh() - clean.tanh()).square())
        found.append(gradients_with_gan(denoiser, objective, pictures(Draws(3, 0, (0, 1))), checkpoints))
    assert_same(found[1], found[0])


# ---- the rest ------------------------------------------------------------------------------------------


def test_regression_alone_trains_the_student_alone(tiny):
    objective = InstaRevive(InstaReviveConfig(matching_weight=0.0, cfg=3.0), tiny())
    assert set(objective.players) == {"student"}
    assert not objective.needs_uncond
    assert [loss.player for loss in objective.losses(pictures(Draws(0, 0, (0, 1))), 5)] == ["student"]


def test_the_warm_up_is_regression_alone(tiny):
    objective = InstaRevive(InstaReviveConfig(regression_steps=3, ratio=2), tiny())
    batch = pictures(Draws(0, 0, (0, 1)))
    who = [[loss.player for loss in objective.losses(batch, step)] for step in range(2, 6)]
    assert who == [["student"], ["student", "fake"], ["fake"], ["student", "fake"]]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"timestep": 0}, "timestep"),
        ({"cfg": math.nan}, "cfg"),
        ({"narrow": 0.01}, "narrow"),
        ({"high": 1.5}, "high"),
        ({"floor": 2.0}, "floor"),
        ({"memory": 1.0}, "memory"),
        ({"gan_on": "nobody"}, "gan_on"),
        ({"matching_weight": 0.0, "regression_weight": 0.0}, "nothing would be learnt"),
        ({"matching_weight": 0.0, "gan_weight": 0.1}, "gan_weight"),
    ],
)
def test_settings_are_checked(settings, names):
    with pytest.raises(ValueError, match=names):
        InstaReviveConfig(**settings)


def test_a_feature_loss_without_a_network_is_refused(tiny):
    objective = InstaRevive(InstaReviveConfig(feature_weight=1.0), tiny())
    with pytest.raises(ValueError, match="feature_weight"):
        objective.prepare([])


def test_a_timestep_that_the_schedule_lacks_is_refused(exact):
    with pytest.raises(ValueError, match="1000"):
        InstaRevive(InstaReviveConfig(timestep=1000), exact(VE))
