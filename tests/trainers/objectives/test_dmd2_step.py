"""DMD2's step as a whole: who moves when, from which levels, and what is refused."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from retort.sampling.path import FLOW, VE
from retort.trainers.objectives.dmd2 import DMD, DMD2, DMD2Config, make_pairs, pseudo_huber
from retort.trainers.objectives.parts.contract import Batch, Draws, alpha_sigma

SCALAR = (1, 1, 1)


def at(count: int, cond: float | None = None, uncond: float | None = None, draws=None, **more) -> Batch:
    def told(mean):
        return None if mean is None else {"mean": torch.full((count,), mean)}

    return Batch(draws=draws, shape=more.pop("shape", SCALAR), cond=told(cond), uncond=told(uncond), **more)


# ---- the step as a whole -------------------------------------------------------------------------------


def test_eight_samples_are_eight_times_one(tiny):
    config = DMD2Config(steps=2, gan_weight=0.5, gan_on="fake", decoupled=True)
    found = []
    for split in ([tuple(range(8))], [(i,) for i in range(8)]):
        denoiser = tiny()
        objective = DMD2(config, denoiser)
        latents = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(9))
        for part in split:
            batch = at(len(part), 1.0, 0.0, Draws(3, 5, part), shape=(3, 4, 4), latents=latents[list(part)])
            if objective.discriminator is None:
                objective.prepare([batch])
                objective.discriminator.double()
                for head in objective.discriminator.heads:
                    torch.nn.init.ones_(head.whole[-1].weight)
            for loss in objective.losses(batch, 0):
                with denoiser.adapter(loss.player):
                    (loss.value * len(part) / 8).backward()
        found.append([p.grad for n in ("student", "fake") for p in denoiser.adapters.parameters(n).values()])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-8, atol=1e-13)


def test_the_student_moves_every_ratio_th_step_and_after_the_warm_up(tiny):
    denoiser = tiny()
    columns = {"pair_noise": torch.zeros(1, 3, 4, 4), "pair_target": torch.zeros(1, 3, 4, 4)}
    objective = DMD2(DMD2Config(ratio=3, regression_steps=2, regression_weight=0.25), denoiser)
    players = []
    for step in range(8):
        batch = at(1, 1.0, 0.0, Draws(0, step, (0,)), shape=(3, 4, 4), columns=columns)
        players.append("".join(loss.player[0] for loss in objective.losses(batch, step)))
    assert players == ["s", "s", "ssf", "f", "f", "ssf", "f", "f"]


def test_without_a_gan_nothing_looks_at_images(tiny):
    objective = DMD2(DMD2Config(), tiny())
    assert not objective.needs_latents
    assert objective.needs_uncond
    assert objective.pairs == 0
    assert objective.players["fake"].modules is None
    batch = at(1, 1.0, 0.0, Draws(0, 0, (0,)), shape=(3, 4, 4))
    objective.prepare([batch])
    assert [loss.player for loss in objective.losses(batch, 0)] == ["student", "fake"]
    data_free = DMD2(DMD2Config(cfg=1.0), tiny())
    assert not data_free.needs_uncond
    assert len(list(data_free.losses(at(1, 1.0, None, Draws(0, 0, (0,)), shape=(3, 4, 4)), 0))) == 2


def test_a_gan_needs_images_and_heads(tiny):
    objective = DMD2(DMD2Config(gan_weight=0.1), tiny())
    assert objective.needs_latents
    batch = at(1, 1.0, 0.0, Draws(0, 0, (0,)), shape=(3, 4, 4), latents=torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="call prepare"):
        list(objective.losses(batch, 1))
    with pytest.raises(ValueError, match="no latents: give images"):
        objective._critic(batch, None, "real")


@pytest.mark.parametrize("k", range(4))
def test_backward_simulation_feeds_the_levels_of_the_grid(exact, nodes, path, k):
    denoiser = exact(path)
    denoiser.set_student(0.5, 0.3)
    seen = []
    told = denoiser.predict_x0

    def watched(x, sigma, cond):
        seen.append((denoiser.adapters.current, x.clone(), float(sigma[0]), torch.is_grad_enabled()))
        return told(x, sigma, cond)

    denoiser.predict_x0 = watched
    noises = {n: torch.randn(2, generator=torch.Generator().manual_seed(i)) for i, n in
              enumerate(("start", "renoise 1", "renoise 2", "renoise 3"))}  # fmt: skip
    batch = at(2, draws=nodes(2, {"step of the grid": k / 4 + 0.1, **noises}))
    objective = DMD2(DMD2Config(steps=4, cfg=1.0), denoiser)
    with torch.no_grad():
        list(objective.losses(batch, 0))
    student = [call for call in seen if call[0] == "student"]
    levels = objective.sigmas.tolist()
    # k calls on the way, one for the sample, one for its gradient.
    assert [level for _, _, level, _ in student] == pytest.approx([*levels[:k], levels[k], levels[k]])
    x = path.unit_start(levels[0], noises["start"].view(2, 1, 1, 1))
    for i in range(k):
        torch.testing.assert_close(student[i][1], x)
        with denoiser.adapter("student"):
            x0 = told(x, torch.full((2,), levels[i]), None).detach()
        x = path.add_noise(x0, levels[i + 1], noises[f"renoise {i + 1}"].view(2, 1, 1, 1))
    torch.testing.assert_close(student[-1][1], x)
    torch.testing.assert_close(student[-2][1], x)


def test_the_first_input_has_unit_variance_for_the_network(exact, path):
    denoiser = exact(path)
    for steps in (1, 4):
        objective = DMD2(DMD2Config(steps=steps, cfg=1.0), denoiser)
        batch = at(1, draws=Draws(0, 0, (0,)), shape=(1, 1, 100000))
        x = path.unit_start(float(objective.sigmas[0]), batch.draws.normal("start", batch.shape))
        a, _ = alpha_sigma(path, objective.sigmas[:1])
        assert float((x * a if path.kind == "VE" else x).std()) == pytest.approx(1.0, abs=0.01)


def test_the_fake_loss_is_in_the_networks_own_units(exact, nodes, path):
    denoiser = exact(path, mean=1.5, std=0.7)
    denoiser.set_student(1.4, 0.2)
    batch = at(2, draws=nodes(2, {"fake level": 0.3, "fake noise": torch.tensor([0.4, -1.0])}))
    x = torch.tensor([0.3, -0.8]).view(2, 1, 1, 1)
    objective = DMD2(DMD2Config(cfg=1.0), denoiser)
    value = objective._fake(batch, x).value
    sigma = denoiser.levels.drawn(torch.full((2,), 0.3))
    n = torch.tensor([0.4, -1.0]).view(2, 1, 1, 1)
    x_t = path.add_noise(x, sigma, n)
    with denoiser.adapter("fake"):
        x0 = denoiser.predict_x0(x_t, sigma, None)
    a, s = (v.view(2, 1, 1, 1) for v in alpha_sigma(path, sigma))
    if path.kind == "VE":
        own, target = (x_t - x0) / sigma.view(2, 1, 1, 1), n
    elif path.kind == "FLOW":
        own, target = (x_t - x0) / s, n - x
    else:
        own, target = (a * x_t - x0) / s, a * n - s * x
    torch.testing.assert_close(value, (own - target).square().mean(), rtol=1e-4, atol=1e-6)


def test_sampling_is_the_simulation_carried_through(exact, path):
    denoiser = exact(path)
    denoiser.set_student(0.5, 0.3)
    objective = DMD2(DMD2Config(steps=4, cfg=1.0), denoiser)
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with denoiser.adapter("student"):
        first, again = (objective.sample(noise, None, None) for _ in range(2))
    assert first.shape == noise.shape
    assert torch.equal(first, again)
    one = DMD2(DMD2Config(cfg=1.0), denoiser)
    with denoiser.adapter("student"):
        torch.testing.assert_close(one.sample(noise, None, None), 0.5 * noise + 0.3)


# ---- the decoupled form --------------------------------------------------------------------------------


def test_decoupled_guidance_is_never_noisier_than_the_students_input(exact, path):
    denoiser = exact(path)
    denoiser.set_student(0.5, 0.3)
    objective = DMD2(DMD2Config(steps=4, cfg=3.0, decoupled=True), denoiser)
    told, seen = denoiser.predict_x0, []

    def watched(x, sigma, cond):
        seen.append((denoiser.adapters.current, sigma, float(cond["mean"][0])))
        return told(x, sigma, cond)

    denoiser.predict_x0 = watched
    count = 400
    for level in objective.sigmas[:-1].tolist():
        seen.clear()
        batch = at(count, 1.0, 0.0, Draws(0, 0, tuple(range(count))))
        objective._gradient(batch, torch.randn(count, *SCALAR), level)
        matching = next(s for name, s, mean in seen if name == "fake")
        guidance = next(s for name, s, mean in seen if mean == 0.0)
        assert float(guidance.max()) <= level * (1 + 1e-6)
        top = denoiser.levels.drawn(torch.tensor([1 - 1e-6]), 0.02, 0.98)
        assert float(matching.max()) > 0.9 * float(top) or path.kind != "FLOW"
        assert float(guidance.max()) > 0.9 * min(level, float(top)) or path.kind != "FLOW"


# ---- regression ----------------------------------------------------------------------------------------


def test_teacher_pairs_are_the_flow_of_the_guided_teacher(affine, path):
    denoiser = affine(path, mean=0.0, std=0.7)
    noise = torch.randn(1, 1, 1, 2000, generator=torch.Generator().manual_seed(0))
    cond, uncond = ({"mean": torch.full((1,), m)} for m in (1.5, 0.5))
    target = make_pairs(denoiser, noise, cond, uncond, 200, 3.0)
    torch.testing.assert_close(target, make_pairs(denoiser, noise, cond, uncond, 200, 3.0))
    # The flow of a Gaussian: every sample keeps its place among the others.
    a, s = alpha_sigma(path, denoiser.schedule.sigmas[-1:])
    want = 3.5 + 0.7 * (noise - a * 3.5) / (a**2 * 0.49 + s**2).sqrt()
    torch.testing.assert_close(target, want, atol=0.02, rtol=0)
    objective = DMD2(dataclasses.replace(DMD, pairs=64, pair_steps=200), denoiser)
    assert objective.pairs == 64
    torch.testing.assert_close(objective.make_pairs(noise, cond, uncond), target)


def test_the_warm_up_reaches_the_teachers_map(exact, play, path):
    denoiser = exact(path, mean=1.5, std=0.7)
    denoiser.set_student(0.1, 0.0)
    objective = DMD2(DMD2Config(regression_steps=400, cfg=1.0), denoiser)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    columns = {"pair_noise": noise, "pair_target": 1.5 + 0.7 * noise}

    def batch(step):
        return at(2, draws=Draws(0, step, (0, 1)), shape=(1, 8, 8), columns=columns)

    history = play(objective, denoiser, batch, 400, {"student": 0.02, "fake": 0.0}, lambda p: (1 - p) ** 2)
    assert denoiser.student() == pytest.approx((0.7, 1.5), abs=0.01)
    assert history[-1]["regression_loss"] < 0.02 * history[0]["regression_loss"]


def test_pseudo_huber_is_absolute_far_away_and_square_nearby():
    x = torch.full((1, 4), 3.0, dtype=torch.float64)
    assert float(pseudo_huber(x, torch.zeros_like(x))) == pytest.approx(3.0, abs=1e-3)
    near = torch.full((1, 4), 1e-6, dtype=torch.float64)
    assert float(pseudo_huber(near, torch.zeros_like(near))) == pytest.approx(1e-12 / (2 * 0.00054), rel=1e-3)


# ---- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"cfg": 0.5}, "cfg"), ({"ratio": 0}, "ratio"), ({"low": 0.9, "high": 0.2}, "low"), ({"shift": 0.0}, "shift"),
        ({"gan_weight": -1.0}, "gan_weight"), ({"gan_on": "moon"}, "gan_on"), ({"cfg": math.nan}, "cfg"),
        ({"decoupled": True, "cfg": 1.0}, "decoupled"), ({"pairs": 0}, "pairs"), ({"fake_rate": 0.0}, "fake_rate"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        DMD2Config(**settings)


def test_a_shift_needs_a_flow(exact):
    with pytest.raises(ValueError, match="shift is 3.0, and this model is not a flow"):
        DMD2(DMD2Config(shift=3.0), exact(VE))
    DMD2(DMD2Config(shift=3.0), exact(FLOW))
