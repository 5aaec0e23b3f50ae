"""TDM on Gaussian data, where the student that each estimator leads to is known in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from gradients import same_with_checkpoints

from retort.sampling.path import FLOW, VE
from retort.sampling.schedule import DiscreteSchedule
from retort.trainers.objectives.parts.contract import Batch, Draws, alpha_sigma
from retort.trainers.objectives.parts.grids import student_sigmas
from retort.trainers.objectives.tdm import TDM, TDMConfig, between, diffuse_on

SHAPE = (1, 2, 2)
PIXART = DiscreteSchedule("sqrt_linear", 1e-4, 0.02)
PIXART_GRID = "899, 674, 449, 224"
# Two noises of four numbers each with exact unit variance and no correlation: means over them are expectations.
PATTERNS = {"noise": (1.0, 1.0, -1.0, -1.0), "tau_noise": (1.0, -1.0, 1.0, -1.0)}


@dataclass(frozen=True)
class Exhaustive:
    """Draws that visit every step of the student and `count` stratified levels in each once."""

    steps: int
    count: int

    @property
    def indices(self):
        return tuple(range(self.steps * self.count))

    def normal(self, name, shape):
        return torch.tensor(PATTERNS[name]).view(1, *shape).expand(len(self.indices), *shape).clone()

    def integers(self, name, low, high):
        assert (name, low, high) == ("pick", 0, self.steps)
        return torch.arange(self.steps).repeat_interleave(self.count)

    def uniform(self, name):
        assert name == "tau"
        return ((torch.arange(self.count) + 0.5) / self.count).repeat(self.steps)

    def common(self, name):
        return 0.0


class Solution:
    """The fixed point of an estimator, in double precision: the student's x0 = A_i x per step, the fake's x0 = k x."""

    def __init__(self, objective: TDM, batch: Batch, std: float, exact: bool):
        path, steps = objective.denoiser.path, objective.config.steps
        sigmas = objective.grids[steps]
        pick = batch.draws.integers("pick", 0, steps)
        self.sigmas, (mid, self.tau) = sigmas, objective.levels(batch, sigmas, pick)
        (a_g, s_g), (a_m, s_m), (a_t, s_t) = (
            [v.double() for v in alpha_sigma(path, level)] for level in (sigmas[pick], mid, self.tau)
        )
        ratio, beta = (v.double() for v in between(path, mid, self.tau))
        teacher = a_t * std**2 / (a_t**2 * std**2 + s_t**2)

        def step(i, A, variance):
            """The fake's gain while the student's is A, the slope of A, and the variance of the state."""
            rows = pick == i
            M = a_m[rows] * A + s_m[rows] * (1 - a_g[rows] * A) / s_g[rows]
            spread = ratio[rows] ** 2 * M**2 * variance + beta[rows] ** 2
            score = (1 - s_t[rows] ** 2 / spread) / a_t[rows]
            fake = score if exact else ratio[rows] * M * A * variance / spread
            return fake, ((fake - teacher[rows]) * ratio[rows] * M).mean(), float((M**2 * variance)[0])

        self.step, self.pick, self.A, self.variances, variance = step, pick, [], [], 1.0
        for i in range(steps):
            low, high = 1e-3, 3.0
            for _ in range(80):
                middle = (low + high) / 2
                low, high = (low, middle) if step(i, middle, variance)[1] > 0 else (middle, high)
            variance = step(i, low, variance)[2]
            self.A.append(low)
            self.variances.append(variance)
        self.fake = self.followed(0.0)

    def followed(self, beside: float):
        """The fake's gain at every tau when the student's are so much beside the solution."""
        fake, variance = torch.zeros(len(self.pick), dtype=torch.float64), 1.0
        for i, A in enumerate(self.A):
            fake[self.pick == i], _, variance = self.step(i, A + beside, variance)
        return fake


def _setup(affine, path, std, count, exact, pixart=False, **config):
    denoiser = affine(path, std=std)
    if pixart:
        denoiser.schedule = PIXART
        config["timesteps"] = PIXART_GRID
    config = TDMConfig(cfg=1.0, huber=0.0, normalise=False, exact_score=exact, **config)
    objective = TDM(config, denoiser)
    batch = Batch(Exhaustive(config.steps, count), SHAPE, None)
    solution = Solution(objective, batch, std, exact)
    # One place in the affine table to every level that either network sees.
    levels = torch.cat([solution.sigmas[:-1], solution.tau])
    fitted = affine(path, levels.tolist(), std=std)
    fitted.schedule = denoiser.schedule
    return TDM(config, fitted), batch, solution


def _place(objective, solution, std, student=0.0, fake=0.0):
    """Set the student to the solution or so much beside it, the fake to its own optimum then or so much beside that."""
    denoiser, steps = objective.denoiser, objective.config.steps
    a, s = (v.double() for v in alpha_sigma(denoiser.path, denoiser.network.levels))
    teacher = a * std**2 / (a**2 * std**2 + s**2)
    total = torch.cat([torch.tensor(solution.A, dtype=torch.float64), solution.followed(student)])
    w = total - teacher
    # An affine table gives the first of equal levels to both: tau never equals a step's start.
    denoiser.set_affine("student", (w + student)[: len(total)].float(), 0.0)
    denoiser.set_affine("fake", (w + fake).float(), 0.0)
    return steps


def _slopes(objective, batch, step=0):
    """d loss / d gain of student and fake per level of the table, and the two losses."""
    denoiser, slopes, values = objective.denoiser, {}, {}
    for loss in objective.losses(batch, step):
        row = denoiser.adapters.parameters(loss.player)["blocks.0.affine.lora_A.weight"]
        row.grad = None
        with denoiser.adapter(loss.player):
            loss.value.backward()
        slopes[loss.player], values[loss.player] = row.grad[0].clone(), loss.value.item()
    return slopes, values


def _is_stationary(objective, batch, solution, std):
    """Both gradients vanish at the solution, and point back to it from beside it."""
    steps = _place(objective, solution, std)
    at, _ = _slopes(objective, batch)
    parts = {"student": slice(0, steps), "fake": slice(steps, len(objective.denoiser.network.levels))}
    for player, part in parts.items():
        _place(objective, solution, std, **{player: 0.05})
        away, _ = _slopes(objective, batch)
        assert (away[player][part] > 0).all()
        assert (at[player][part].abs() < 1e-2 * away[player][part] + 1e-7).all()


@pytest.mark.parametrize(
    ("std", "exact", "variances"),
    [
        (0.7, True, (0.9950, 0.9352, 0.6984, 0.4900)),
        (0.7, False, (0.9985, 0.9720, 0.8407, 0.4900)),
        (1.0, True, (1.0, 1.0, 1.0, 1.0)),
        (1.0, False, (1.007, 1.074, 1.279, 1.000)),
    ],
)
def test_boundaries_on_pixarts_schedule(affine, std, exact, variances):
    # With the exact trajectory score every state has the teacher's variance, with the demo's
    # target the last one.
    objective, batch, solution = _setup(affine, VE, std, 96, exact, pixart=True)
    assert solution.variances == pytest.approx(variances, abs=2e-3)
    if exact:
        a, s = alpha_sigma(VE, solution.sigmas[1:])
        assert solution.variances == pytest.approx((a**2 * std**2 + s**2).tolist(), abs=1e-6)
    _is_stationary(objective, batch, solution, std)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "demo"])
def test_fixed_point_on_every_path(affine, path, exact):
    std = 0.7
    objective, batch, solution = _setup(affine, path, std, 24, exact)
    assert solution.variances[-1] == pytest.approx(std**2, abs=1e-6)
    if exact:
        a, s = alpha_sigma(path, solution.sigmas[1:])
        assert solution.variances == pytest.approx((a**2 * std**2 + s**2).tolist(), abs=1e-6)
    _is_stationary(objective, batch, solution, std)
    # The student's own sampler ends at the data's variance.
    _place(objective, solution, std)
    with objective.denoiser.adapter("student"):
        x = objective.sample(torch.tensor(PATTERNS["noise"]).view(1, *SHAPE), None, None)
    assert x.square().mean().item() == pytest.approx(std**2, rel=1e-4)


def test_descent_arrives_at_the_fixed_point(affine):
    std = 0.7
    objective, batch, solution = _setup(affine, FLOW, std, 8, exact=True)
    _place(objective, solution, std, student=-0.2, fake=0.1)
    rows = {p: objective.denoiser.adapters.parameters(p)["blocks.0.affine.lora_A.weight"] for p in ("student", "fake")}
    optimisers = {
        "student": torch.optim.Adam([rows["student"]], 3e-3),
        "fake": torch.optim.Adam([rows["fake"]], 1.5e-2),
    }
    for step in range(400):
        _slopes(objective, batch, step)
        for optimiser in optimisers.values():
            optimiser.step()
    with objective.denoiser.adapter("student"):
        x = objective.sample(torch.tensor(PATTERNS["noise"]).view(1, *SHAPE), None, None)
    assert x.square().mean().item() == pytest.approx(std**2, abs=0.02)


def test_student_slope_is_the_closed_form(affine, path):
    # E[g x] with g = (k_fake - k_teacher) x_tau, for any fake: 2 ratio M v (k_f - k_p) / (steps count) summed over tau.
    std = 0.7
    objective, batch, solution = _setup(affine, path, std, 6, exact=True)
    steps = _place(objective, solution, std, fake=0.1)
    at, _ = _slopes(objective, batch)
    pick = batch.draws.integers("pick", 0, steps)
    mid, tau = objective.levels(batch, solution.sigmas, pick)
    ratio = between(path, mid, tau)[0]
    variance = [1.0, *solution.variances]
    for i in range(steps):
        (a_g, s_g), (a_m, s_m) = (alpha_sigma(path, solution.sigmas[i + k]) for k in (0, 1))
        M = a_m * solution.A[i] + s_m * (1 - a_g * solution.A[i]) / s_g
        rows = pick == i
        # fake - teacher at the solution averages to nothing; 0.1 is what was put beside it.
        expected = 2 * 0.1 * (ratio[rows].double() * M.double() * variance[i]).sum() / len(pick)
        extra = (solution.fake[rows] - _teacher(path, tau[rows], std)) * ratio[rows].double() * M.double() * variance[i]
        expected = expected + 2 * extra.sum() / len(pick)
        assert at["student"][i].item() == pytest.approx(expected.item(), rel=1e-3)


def _teacher(path, sigma, std):
    a, s = (v.double() for v in alpha_sigma(path, sigma))
    return a * std**2 / (a**2 * std**2 + s**2)


def test_diffusing_on_gives_the_marginal_of_the_higher_level(path):
    draws = Draws(0, 0, (0, 1))
    x0, one, two = (draws.normal(name, (1, 120, 120)).double() for name in ("x0", "one", "two"))
    low, high = torch.tensor([0.2, 0.5], dtype=torch.float64), torch.tensor([0.7, 0.9], dtype=torch.float64)
    direct = path.add_noise(torch.zeros_like(x0), high, one).flatten(1).std(1)
    onwards = diffuse_on(path, path.add_noise(torch.zeros_like(x0), low, one), low, high, two).flatten(1).std(1)
    assert torch.allclose(direct, onwards, rtol=0.02)
    clean = path.add_noise(x0, high, torch.zeros_like(x0))
    still = diffuse_on(path, path.add_noise(x0, low, 0 * one), low, high, 0 * two)
    assert torch.allclose(clean, still)


@pytest.mark.parametrize("diffusing", ["separate", "top"])
def test_levels_stay_in_their_interval(affine, path, diffusing):
    objective = TDM(TDMConfig(diffusing=diffusing, random_mid=True), affine(path))
    draws = Draws(0, 0, tuple(range(2000)))
    sigmas, pick = objective.grids[4], draws.integers("pick", 0, 4)
    mid, tau = objective.levels(Batch(draws, SHAPE, None), sigmas, pick)
    start = sigmas[pick] if diffusing == "separate" else sigmas[0]
    assert (mid >= sigmas[pick + 1]).all() and (mid < sigmas[pick]).all()
    assert (tau >= mid * (1 - 1e-6)).all() and (tau < start).all()
    assert (tau[pick == 3] >= objective._level(torch.tensor(19.9))).all()
    assert ((tau > sigmas[pick]).any()) == (diffusing == "top")


def test_many_steps_leave_room_for_tau(affine, path):
    objective = TDM(TDMConfig(steps=50, exact_score=True), affine(path))
    draws = Draws(0, 0, tuple(range(1000)))
    pick = draws.integers("pick", 0, 50)
    mid, tau = objective.levels(Batch(draws, SHAPE, None), objective.grids[50], pick)
    assert (tau > mid).all() and (tau < objective.grids[50][pick]).all()


def test_steps_are_chosen_once_for_the_whole_step(affine):
    objective = TDM(TDMConfig(steps=4, steps_choices="1, 2, 4", cfg=1.0), affine(VE))
    seen = set()
    objective.rollout, real = lambda b, s, p: (seen.add(len(s) - 1), real(b, s, p))[1], objective.rollout
    for step in range(12):
        for first in (0, 4):
            _slopes(objective, Batch(Draws(0, step, tuple(range(first, first + 4))), SHAPE, None))
    assert seen == {1, 2, 4}
    single = TDM(TDMConfig(steps=1, cfg=1.0), affine(VE))
    assert torch.equal(objective.grids[1], single.grids[1]) and torch.equal(
        objective.grids[4], student_sigmas(objective.denoiser, 4, "")
    )


def test_guidance_moves_the_students_target(affine, path):
    denoiser = affine(path)
    batch = Batch(Draws(0, 0, (0, 1)), SHAPE, {"mean": torch.ones(2)}, {"mean": torch.zeros(2)})
    gaps = []
    for cfg in (1.0, 2.0, 4.0):
        objective = TDM(TDMConfig(cfg=cfg), denoiser)
        assert objective.needs_uncond == (cfg != 1.0)
        gaps.append([loss.metrics for loss in objective.losses(batch, 0)][1]["gap"].item())
    # An untrained fake score is the teacher, bit for bit: only the guidance is left.
    assert gaps[0] == 0.0 and gaps[2] == pytest.approx(3 * gaps[1], rel=1e-4)


def test_demo_weight_tempers_by_the_mean(affine, path):
    objective = TDM(TDMConfig(), affine(path))
    draws = Draws(0, 0, (0, 1, 2))
    eps, noise = draws.normal("e", SHAPE), draws.normal("n", SHAPE)
    mid, tau = torch.tensor([0.0, 0.3, 0.5]), torch.tensor([0.2, 0.4, 0.9])
    weight = objective.demo_weight(eps, noise, mid, tau)
    (a_m, s_m), (a, s) = alpha_sigma(path, mid), alpha_sigma(path, tau)
    for i in range(3):
        beta = (s[i] ** 2 - (a[i] * s_m[i] / a_m[i]) ** 2) ** 0.5
        m = (a[i] / a_m[i] * s_m[i] * eps[i] + beta * noise[i]) / s[i]
        expected = min((a[i] / s[i]).item() ** 2, 5.0) * torch.exp((noise[i] ** 2).mean() / 2 - (m**2).mean() / 2)
        assert weight[i].item() == pytest.approx(expected.item(), rel=1e-4)
    # From a clean state the noise is all fresh, and the weight is the SNR's alone.
    assert weight[0].item() == pytest.approx(5.0)


@pytest.mark.parametrize("config", [{}, {"exact_score": True, "diffusing": "top", "huber": 0.0}])
def test_a_batch_of_eight_is_eight_batches(affine, path, config):
    objective = TDM(TDMConfig(**config), affine(path))
    for player in ("student", "fake"):
        objective.denoiser.set_affine(player, 0.2, -0.1)

    def at(indices):
        n = len(indices)
        cond = {"mean": torch.linspace(0, 1, 8)[list(indices)]}
        return _slopes(objective, Batch(Draws(4, 0, indices), SHAPE, cond, {"mean": torch.zeros(n)}))[0]

    whole, parts = at(tuple(range(8))), [at((i,)) for i in range(8)]
    for player in whole:
        assert torch.allclose(whole[player], sum(p[player] for p in parts) / 8, rtol=1e-4, atol=1e-6)


def test_checkpointing_changes_no_gradient(tiny, path):
    denoiser = tiny(path)
    objective = TDM(TDMConfig(), denoiser)
    batch = Batch(Draws(4, 0, (0, 1, 2)), (3, 4, 4), {"mean": torch.tensor([0.2, 0.5, 0.9])}, {"mean": torch.zeros(3)})
    same_with_checkpoints(objective, batch)


def test_bad_settings_are_named():
    bad = {
        "steps": 0, "steps_choices": "2, 3", "cfg": -1.0, "diffusing": "all", "huber": -1.0, "fake_rate": 0.0,
    }  # fmt: skip
    for field, value in bad.items():
        with pytest.raises(ValueError, match=field):
            TDMConfig(**{field: value})
    with pytest.raises(ValueError, match="timesteps"):
        TDMConfig(timesteps="899", steps_choices="1, 4")
    for text in ("a, b", "0, 4", ","):
        with pytest.raises(ValueError, match="steps_choices"):
            TDMConfig(steps_choices=text)
