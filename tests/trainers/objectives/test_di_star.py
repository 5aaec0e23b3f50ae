"""DI*: its gradient is that of the distance, which a version without the networks' graphs fails."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from gradients import same_with_checkpoints

from retort.sampling.path import FLOW, VE, VP, NoisePath
from retort.trainers.objectives.di_star import DIStar, DIStarConfig, partials
from retort.trainers.objectives.parts.contract import Batch, Draws, alpha_sigma

ONE = (1, 1, 1)
A_T, S_T, MEAN, STD, B, A0, C = 0.6, 0.8, 0.4, 1.3, -0.3, 0.5, 0.2
# Slopes of the distance by finite differences, and those that are left without the networks' graphs.
SLOPE_B, SLOPE_A = -0.3808, -0.3367
DETACHED_B, DETACHED_A = -0.4343, -0.1926
# All three have a = 0.6, s = 0.8 at this level.
PATHS = [(VE, 4 / 3), (NoisePath("FLOW", 2.0), 0.4), (VP, 4 / 3)]


@dataclass(frozen=True)
class Quantiles:
    """Draws that are all pairs of equally likely values of two normals, once for each of `levels` levels."""

    points: int = 160
    levels: int = 1

    @property
    def indices(self):
        return range(self.levels * self.points**2)

    def normal(self, name, shape):
        q = torch.special.ndtri((torch.arange(self.points, dtype=torch.float64) + 0.5) / self.points)
        q = (q / q.square().mean().sqrt()).float()
        q = q.repeat_interleave(self.points) if name.startswith("start") else q.repeat(self.points)
        return q.repeat(self.levels).view(-1, *shape)

    def uniform(self, name):
        return ((torch.arange(self.levels) + 0.5) / self.levels).repeat_interleave(self.points**2)

    def common(self, name):
        return 0.0


def _linear(path, sigma, mean, std):
    """(slope, offset) of the posterior mean of N(mean, std^2)."""
    a, s = (float(v) for v in alpha_sigma(path, torch.tensor([sigma])))
    slope = a * std**2 / (a**2 * std**2 + s**2)
    return slope, mean * (1 - slope * a)


class Setting:
    """A student b + A z of one number with its exact fake score, at the levels `sigmas` (student's input the last)."""

    def __init__(self, affine, path, sigmas, config, mean=MEAN, std=STD):
        self.denoiser = affine(path, sigmas, mean, std)
        self.path, self.mean, self.std, self.levels = path, mean, std, torch.tensor(sigmas)
        self.denoiser.schedule = SimpleNamespace(
            sigmas=self.levels, timestep=lambda sigma: (self.levels - sigma).abs().argmin()
        )
        self.denoiser.sigma_range = (sigmas[0], sigmas[-1])
        self.objective = DIStar(config, self.denoiser)
        self.objective.sigmas = torch.tensor([sigmas[-1], 0.0])
        self.batch = Batch(Quantiles(160 if len(sigmas) == 1 else 110, len(sigmas)), ONE, None)

    def place(self, b, A, fake=None):
        """The student at N(b, A^2), and the fake score likewise unless it is given."""
        networks = (fake or (b, A), (self.mean, self.std))
        pairs = [[_linear(self.path, float(s), *network) for network in networks] for s in self.levels]
        w, c = ([mine[k] - teacher[k] for mine, teacher in pairs] for k in (0, 1))
        self.denoiser.set_affine("fake", w, c)
        slope, offset = pairs[-1][1]
        self.denoiser.set_affine("student", A / self.path.noise_scale - slope, b - offset)

    def slopes(self, b, A):
        """d loss / d (b, A) by the production path."""
        self.place(b, A)
        loss = next(iter(self.objective.losses(self.batch, 0)))
        assert loss.player == "student"
        row = self.denoiser.adapters.parameters("student")["blocks.0.affine.lora_A.weight"]
        row.grad = None
        with self.denoiser.adapter("student"):
            loss.value.backward()
        n = len(self.levels)
        return row.grad[0, 2 * n - 1].item(), row.grad[0, n - 1].item() / self.path.noise_scale

    def distance(self, b, A):
        """D with the score of N(b, A^2) in place of the student's, on the student's own samples."""
        self.place(B, A0, (b, A))
        return next(iter(self.objective.losses(self.batch, 0))).metrics["distance"].item()

    def differences(self, h=5e-3):
        """dD / d(b, A) by finite differences at (B, A0); as in SIM's theorem 3.1 the samples are held."""
        return (
            (self.distance(B + h, A0) - self.distance(B - h, A0)) / (2 * h),
            (self.distance(B, A0 + h) - self.distance(B, A0 - h)) / (2 * h),
        )


def _config(**changes):
    return DIStarConfig(**{"cfg": 1.0, "huber": C, "space": "score", "normalise": False, **changes})


@pytest.fixture
def detached(monkeypatch):
    """A denoiser whose answers carry no gradient to x: what no_grad around the networks would make of the method."""

    def apply(denoiser):
        predict = denoiser.predict_x0

        def without(x, sigma, cond):
            x0 = predict(x, sigma, cond)
            return x0.detach() + 0 * x if x.requires_grad else x0

        monkeypatch.setattr(denoiser, "predict_x0", without)

    return apply


@pytest.mark.parametrize(("path", "sigma"), PATHS, ids=["VE", "FLOW", "VP"])
def test_gradient_is_that_of_the_distance(affine, path, sigma):
    setting = Setting(affine, path, [sigma], _config())
    assert setting.differences() == pytest.approx((SLOPE_B, SLOPE_A), abs=2e-3)
    assert setting.slopes(B, A0) == pytest.approx((SLOPE_B, SLOPE_A), abs=2e-3)


@pytest.mark.parametrize(("path", "sigma"), PATHS, ids=["VE", "FLOW", "VP"])
def test_without_the_networks_graphs_it_is_another_loss(affine, detached, path, sigma):
    setting = Setting(affine, path, [sigma], _config())
    detached(setting.denoiser)
    slopes = setting.slopes(B, A0)
    assert slopes == pytest.approx((DETACHED_B, DETACHED_A), abs=2e-3)
    assert abs(slopes[0] - SLOPE_B) > 0.05 and abs(slopes[1] - SLOPE_A) > 0.1


@pytest.mark.parametrize("distance", ["pseudo_huber", "l2"])
@pytest.mark.parametrize("space", ["x0", "score"])
def test_slopes_are_finite_differences_over_several_levels(affine, distance, space):
    for path, sigmas in ((VE, [0.4, 1.3, 3.0]), (FLOW, [0.2, 0.5, 0.8])):
        setting = Setting(affine, path, sigmas, _config(distance=distance, space=space, low=0.0, high=1.0))
        if path is FLOW:
            # Three stratified places of (0.05, 0.95), which are the levels themselves there.
            setting.objective.config = _config(distance=distance, space=space, low=0.05, high=0.95)
        assert setting.slopes(B, A0) == pytest.approx(setting.differences(), abs=5e-3, rel=1e-2)


def test_integral_kl_is_its_closed_form(affine):
    # KL(N(b, A^2) || N(mu, S^2)) at a level: d/db = a^2 (b - mu) / v_p, d/dA = a^2 A (1 / v_p - 1 / v_q).
    for path, sigma in PATHS:
        slopes = Setting(affine, path, [sigma], _config(distance="kl")).slopes(B, A0)
        v_q, v_p = (A_T**2 * std**2 + S_T**2 for std in (A0, STD))
        assert slopes == pytest.approx((A_T**2 * (B - MEAN) / v_p, A_T**2 * A0 * (1 / v_p - 1 / v_q)), abs=1e-4)


@pytest.mark.parametrize("config", [{}, {"distance": "l2"}, {"distance": "l2", "sid_alpha": 1.2}, {"distance": "kl"}])
@pytest.mark.parametrize("space", ["x0", "score"])
def test_partials_are_those_of_the_surrogate(config, space):
    g = torch.Generator().manual_seed(0)
    x0, fake, ref = (torch.randn(3, 2, 4, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3))
    a, s = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64), torch.tensor([0.9, 0.8, 0.4], dtype=torch.float64)
    settings = _config(space=space, **config)
    scale = (a / s**2 if space == "score" else torch.ones(3, dtype=torch.float64)).view(3, 1, 1)
    y = scale * (fake - ref)
    if settings.distance == "kl":
        weight = a.view(3, 1, 1) if space == "score" else 1.0
        surrogate = (weight * y.detach() * x0).sum()
    elif settings.distance == "l2":
        surrogate = -(y * scale * ((fake - x0) + (settings.sid_alpha - 1) * (fake - ref))).sum()
    else:
        slope = y / (y.square().flatten(1).mean(1).view(3, 1, 1) + C**2).sqrt()
        surrogate = -(slope * scale * (fake - x0)).sum()
    expected = torch.autograd.grad(surrogate, (x0, fake, ref), allow_unused=True)
    got = partials(settings, x0.detach(), fake.detach(), ref.detach(), a, s)
    for mine, theirs in zip(got[:3], expected, strict=True):
        assert torch.allclose(mine, torch.zeros_like(mine) if theirs is None else theirs, rtol=1e-9, atol=1e-12)


def _reward(u):
    return lambda x, prompts, batch: u * x.flatten(1).mean(1)


def _levels(setting):
    """(a^2 / v^2, a^2 / v, a / v), means over the levels, v the teacher's variance there."""
    a, s = alpha_sigma(setting.path, setting.levels)
    v = a**2 * setting.std**2 + s**2
    return tuple(x.mean().item() for x in (a**2 / v**2, a**2 / v, a / v))


@pytest.mark.parametrize("distance", ["l2", "kl"])
def test_reward_moves_the_fixed_point_as_far_as_it_should(affine, distance):
    alpha, u = 0.5, 0.3
    for path, sigmas in ((VE, [0.4, 1.3, 3.0]), (VP, [0.4, 1.3, 3.0])):
        config = _config(distance=distance, low=0.0, high=1.0, alpha_rew=alpha)
        setting = Setting(affine, path, sigmas, config)
        setting.objective.reward = _reward(u)
        squares, plain, _ = _levels(setting)
        fixed = MEAN + alpha * u / (squares if distance == "l2" else plain)
        at, beside = setting.slopes(fixed, STD)[0], setting.slopes(fixed + 0.5, STD)[0]
        assert abs(at) < 1e-3 < beside


def test_the_bounded_distance_loses_to_a_strong_reward(affine):
    config = _config(low=0.0, high=1.0, alpha_rew=1.0)
    setting = Setting(affine, VE, [0.4, 1.3, 3.0], config)
    bound = _levels(setting)[2]
    for u, holds in ((0.9 * bound, True), (1.1 * bound, False)):
        setting.objective.reward = _reward(u)
        slope = setting.slopes(MEAN + 200.0, STD)[0]
        # Far away the pull is the bound itself.
        assert slope == pytest.approx(bound - u, abs=1e-3)
        assert (slope > 0) == holds


@pytest.mark.parametrize("guidance", ["in", "out"])
def test_guidance_moves_the_mean(affine, guidance):
    # The guided Gaussian is N(mu_u + w (mu_c - mu_u), S^2); both ways end there on equal variances ("kl", "l2" in).
    for path in (VE, FLOW):
        sigma = 1.0 if path is VE else 0.5
        distance = "l2" if guidance == "in" else "kl"
        setting = Setting(
            affine, path, [sigma], _config(cfg=3.0, guidance=guidance, distance=distance), mean=1.5, std=0.7
        )
        n = len(setting.batch)
        setting.batch.cond, setting.batch.uncond = {"mean": torch.full((n,), 1.5)}, {"mean": torch.full((n,), 0.5)}
        at = setting.slopes(3.5, 0.7)
        assert at == pytest.approx((0.0, 0.0), abs=2e-3)
        assert setting.slopes(3.6, 0.7)[0] > 5e-3 > -5e-3 > setting.slopes(3.4, 0.7)[0]


def test_guided_gradient_has_a_product_for_each_prompt(affine):
    # Against autograd through everything at once, on a teacher whose Jacobian is not symmetric between the prompts.
    denoiser = affine(VE, [0.5, 2.0])
    denoiser.set_affine("fake", 0.2, 0.1)
    predict = denoiser.predict_x0
    denoiser.predict_x0 = lambda x, sigma, cond: predict(x, sigma, cond) + (cond["mean"].view(-1, 1, 1, 1) * x).sin()
    settings = DIStarConfig(cfg=3.0, normalise=False)
    objective = DIStar(settings, denoiser)
    draws = Draws(0, 0, (0, 1, 2))
    cond, uncond = {"mean": torch.tensor([0.5, 1.0, 2.0])}, {"mean": torch.full((3,), -0.7)}
    batch = Batch(draws, (2, 3, 3), cond, uncond)
    x = draws.normal("x", batch.shape)
    got, _ = objective._gradient(batch, x, 1.0)

    leaf = x.clone().requires_grad_()
    sigma = denoiser.schedule.sigmas[20 + (draws.uniform("matching level") * 960).long()]
    x_t = VE.add_noise(leaf, sigma, draws.normal("matching noise", batch.shape))
    with denoiser.adapter("fake"):
        fake = denoiser.predict_x0(x_t, sigma, cond)
    with denoiser.adapter(None):
        without = denoiser.predict_x0(x_t, sigma, uncond)
        ref = without + 3.0 * (denoiser.predict_x0(x_t, sigma, cond) - without)
    u = fake - ref
    slope = u / (u.square().flatten(1).mean(1).view(3, 1, 1, 1) + settings.huber**2).sqrt()
    expected = torch.autograd.grad(-(slope * (fake - leaf)).sum(), leaf)[0]
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-4)


def _run(objective, indices, step=0):
    n, slopes = len(indices), {}
    mean = torch.linspace(0, 1, 8)[list(indices)]
    batch = Batch(Draws(4, step, indices), (1, 3, 3), {"mean": mean}, {"mean": torch.zeros(n)}, prompts=("a",) * n)
    for loss in objective.losses(batch, step):
        row = objective.denoiser.adapters.parameters(loss.player)["blocks.0.affine.lora_A.weight"]
        row.grad = None
        with objective.denoiser.adapter(loss.player):
            loss.value.backward()
        slopes[loss.player] = row.grad.clone()
    return slopes


@pytest.mark.parametrize("config", [{}, {"guidance": "out", "alpha_rew": 0.3, "steps": 3}])
def test_a_batch_of_eight_is_eight_batches(affine, path, config):
    denoiser = affine(path)
    objective = DIStar(DIStarConfig(cfg=2.0, **config), denoiser)
    objective.reward = _reward(1.0)
    for player in ("student", "fake"):
        denoiser.set_affine(player, 0.2, -0.1)
    whole, parts = _run(objective, tuple(range(8))), [_run(objective, (i,)) for i in range(8)]
    for player in ("student", "fake"):
        assert torch.allclose(whole[player], sum(p[player] for p in parts) / 8, rtol=1e-3, atol=1e-5)
    assert list(_run(objective, (0, 1), step=1)) == ["fake"]


def test_checkpointing_changes_no_gradient(tiny, path):
    denoiser = tiny(path)
    objective = DIStar(DIStarConfig(cfg=2.0), denoiser)
    batch = Batch(Draws(4, 0, (0, 1, 2)), (3, 4, 4), {"mean": torch.tensor([0.2, 0.5, 0.9])}, {"mean": torch.zeros(3)})
    same_with_checkpoints(objective, batch)


def test_a_missing_reward_is_said_before_the_first_step(affine):
    objective = DIStar(DIStarConfig(alpha_rew=1.0), affine(VE))
    batch = Batch(Draws(0, 0, (0,)), ONE, None)
    with pytest.raises(ValueError, match="alpha_rew"):
        objective.prepare([batch])
    objective.reward = _reward(1.0)
    objective.prepare([batch])


def test_bad_settings_are_named():
    bad = {
        "distance": "l1", "space": "v", "guidance": "both", "huber": 0.0, "alpha_rew": -1.0, "sid_alpha": 1.2,
        "steps": 0, "cfg": 0.5, "ratio": 0, "fake_rate": 0.0, "low": 0.99,
    }  # fmt: skip
    for field, value in bad.items():
        with pytest.raises(ValueError, match=field):
            DIStarConfig(**{field: value})
