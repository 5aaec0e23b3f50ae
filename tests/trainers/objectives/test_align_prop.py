"""AlignProp: its gradient is the derivative of the sampler's end by finite differences and by closed form."""

from __future__ import annotations

import statistics

import pytest
import torch

from retort.sampling.levels import Parametrisation
from retort.sampling.path import FLOW, VE, VP
from retort.trainers import checkpointing
from retort.trainers.objectives.align_prop import AlignProp, AlignPropConfig, kept_steps, most_kept
from retort.trainers.objectives.parts.contract import Batch, Draws

STD, STEPS, THETA = 0.5, 20, 0.3
# d x0 / d theta with a gradient through the last K steps, and with the networks' input stopped.
TABLE = {1: 0.00990, 5: 0.1040, 10: 0.5848, STEPS: 0.95387}
STOPPED = {1: 0.00990, 5: 0.1080, 10: 0.8158, STEPS: 2.78797}
KARRAS = (10 ** (1 / 7) + torch.linspace(0, 1, STEPS, dtype=torch.float64) * (0.05 ** (1 / 7) - 10 ** (1 / 7))) ** 7


def _levels(path):
    """The table's 20 Karras levels 10 .. 0.05 in the path's own sigma."""
    return KARRAS / (1 + KARRAS) if path is FLOW else KARRAS


def _push(path):
    """dx0 / dtheta (20,) of the posterior mean of N(theta, STD^2) at each level."""
    s = KARRAS
    return s**2 / (STD**2 + s**2)


class Setting:
    """A student whose mean theta is what it learns: its affine part is the posterior mean's derivative times theta."""

    def __init__(self, affine, path, **config):
        levels = _levels(path).tolist()
        self.denoiser = affine(path, levels, 0.0, STD)
        self.push = _push(path)
        self.objective = AlignProp(AlignPropConfig(**{"steps": STEPS, "cfg": 1.0, **config}), self.denoiser)
        self.objective.sigmas = torch.tensor([*levels, 0.0])
        self.objective.reward = lambda x, prompts, batch: x.flatten(1).mean(1)
        self.batch = Batch(Draws(3, 0, tuple(range(4))), (1, 2, 2), None, prompts=("a",) * 4)
        self.place(THETA)

    def place(self, theta):
        """Make the student the exact sampler of N(theta, STD^2)."""
        self.denoiser.set_affine("student", 0.0, (theta * self.push).tolist())

    def loss(self):
        """The production loss."""
        (loss,) = self.objective.losses(self.batch, 0)
        return loss

    def slope(self):
        """d mean reward / d theta."""
        row = self.denoiser.adapters.parameters("student")["blocks.0.affine.lora_A.weight"]
        row.grad = None
        with self.denoiser.adapter("student"):
            self.loss().value.backward()
        return -float((row.grad[0, STEPS:].double() * self.push).sum())


@pytest.mark.parametrize(
    ("config", "most"),
    [({"truncation": "fixed", "last": 3}, 3), ({}, STEPS), ({"truncation": "normal"}, STEPS - 1), ({"steps": 1}, 1)],
)
def test_memory_is_counted_for_the_most_steps_that_can_be_drawn(affine, config, most):
    setting = Setting(affine, VE, **config)
    setting.objective.heaviest = True
    assert setting.loss().metrics["kept"] == most == most_kept(setting.objective.config)
    drawn = {kept_steps(setting.objective.config, Draws(3, step, (0,)), STEPS) for step in range(200)}
    assert config == {"steps": 1} or max(drawn) <= most
    # Steps differ in what waits where graphs may wait, and the first of a run says nothing of the next.
    assert not setting.objective.varies
    setting.denoiser.keeps_graphs = True
    assert setting.objective.varies is (config.get("truncation") != "fixed" and most > 1)


@pytest.mark.parametrize("path", [VE, FLOW, VP], ids=["VE", "FLOW", "VP"])
@pytest.mark.parametrize("last", TABLE)
def test_derivative_of_the_last_steps(affine, path, last):
    # All three paths carry the same sampler in other coordinates, and end at the same x0.
    assert Setting(affine, path, truncation="fixed", last=last).slope() == pytest.approx(TABLE[last], abs=1e-4)


@pytest.mark.parametrize("last", STOPPED)
def test_derivative_with_stopped_inputs(affine, last):
    slope = Setting(affine, VE, truncation="fixed", last=last, stopped=True).slope()
    assert slope == pytest.approx(STOPPED[last], abs=1e-4)


@pytest.mark.parametrize("last", STOPPED)
def test_stopped_inputs_on_a_flow(affine, last):
    # Each step adds (s' - s) v, and dv / dtheta is -(dx0 / dtheta) / s.
    s = torch.cat([_levels(FLOW), torch.zeros(1)])
    expected = float(((s[:-1] - s[1:]) / s[:-1] * _push(FLOW))[-last:].sum())
    slope = Setting(affine, FLOW, truncation="fixed", last=last, stopped=True).slope()
    assert slope == pytest.approx(expected, abs=1e-4)


def test_full_derivative_is_the_finite_difference(affine):
    setting = Setting(affine, VE, truncation="fixed", last=STEPS)
    ends = []
    for theta in (THETA + 0.5, THETA - 0.5):
        setting.place(theta)
        ends.append(setting.loss().metrics["reward"].item())
    assert ends[0] - ends[1] == pytest.approx(0.953874, abs=1e-5)


@pytest.mark.parametrize("path", [VE, FLOW], ids=["VE", "FLOW"])
def test_expected_gradient_is_the_average_over_k(affine, path):
    every = [Setting(affine, path, truncation="fixed", last=k).slope() for k in range(1, STEPS + 1)]
    setting, drawn = Setting(affine, path), {}
    for step in range(200):
        setting.batch.draws = Draws(3, step, setting.batch.draws.indices)
        kept = kept_steps(setting.objective.config, setting.batch.draws, STEPS)
        if kept not in drawn:
            drawn[kept] = setting.slope()
    assert sorted(drawn) == list(range(1, STEPS + 1))
    assert statistics.mean(drawn.values()) == pytest.approx(statistics.mean(every), abs=1e-5)


def test_k_is_drawn_as_the_paper_and_the_released_code_draw_it():
    uniform, normal = (
        [kept_steps(AlignPropConfig(steps=50, truncation=t), Draws(0, i, (0,)), 50) for i in range(4000)]
        for t in ("uniform", "normal")
    )
    assert min(uniform) == 1 and max(uniform) == 50 and statistics.mean(uniform) == pytest.approx(25.5, abs=1)
    # steps - floor(s), s ~ N(42, 5) within [1, 50): the truncated normal's mean in closed form, and half for the floor.
    edge = torch.tensor((50 - 42) / 5)
    unit = torch.distributions.Normal(0, 1)
    mean = 42 - 5 * float(unit.log_prob(edge).exp() / unit.cdf(edge))
    assert min(normal) == 1 and statistics.mean(normal) == pytest.approx(50 - mean + 0.5, abs=0.3)
    for steps in (1, 2, 3):
        config = AlignPropConfig(steps=steps, truncation="normal")
        kept = {kept_steps(config, Draws(0, i, (0,)), steps) for i in range(99)}
        assert kept <= set(range(1, max(2, steps)))


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("sampler", ["ode", "ancestral"])
def test_checkpointing_changes_no_gradient(tiny, path, stopped, sampler):
    found = []
    for checkpoint, blocks in ((False, False), (True, False), (True, True)):
        denoiser = tiny(path)
        if blocks:
            checkpointing.enable(denoiser.network)
        config = AlignPropConfig(
            steps=4, cfg=2.0, sampler=sampler, truncation="fixed", last=3, stopped=stopped, checkpoint=checkpoint
        )
        objective = AlignProp(config, denoiser)
        objective.reward = lambda x, prompts, batch: -(x - 1).square().flatten(1).mean(1)
        told = {"mean": torch.tensor([0.2, 0.5])}
        batch = Batch(Draws(0, 0, (0, 1)), (3, 4, 4), told, {"mean": torch.zeros(2)}, prompts=("a", "b"))
        (loss,) = objective.losses(batch, 0)
        with denoiser.adapter("student"):
            loss.value.backward()
        found.append([p.grad for p in denoiser.adapters.parameters("student").values()])
    for other in found[1:]:
        assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-15) for a, b in zip(found[0], other, strict=True))
    assert any(float(g.abs().sum()) > 0 for g in found[0])


@pytest.mark.parametrize(("path", "prediction"), [
    (VE, "eps"), (VE, "v"), (VE, "x0"), (VP, "eps"), (VP, "v"), (FLOW, "flow"),
])  # fmt: skip
def test_slope_of_a_held_network_is_its_outputs_arithmetic(path, prediction):
    x, s, out = (torch.tensor([v], dtype=torch.float64) for v in (0.7, 1.3, -0.4))
    s = s / (1 + s) if path is FLOW else s

    def x0(x):
        # Each output as its paper defines it: n, a n - s x0 (v), n - x0 (flow), on x_t = a x0 + s n.
        root = (1 + s**2).sqrt()
        a, b = (1 - s, s) if path is FLOW else (1 / root, s / root)
        x_t = x / root if path is VE else x
        found = {"eps": (x_t - b * out) / a, "v": a * x_t - b * out, "flow": x_t - s * out, "x0": out + 0 * x}
        return found[prediction]

    x.requires_grad_()
    (expected,) = torch.autograd.grad(x0(x).sum(), x)
    assert torch.allclose(Parametrisation(prediction, path).through(s), expected, rtol=1e-12)


def test_early_steps_build_no_graph(affine):
    setting = Setting(affine, VE, truncation="fixed", last=3, checkpoint=False)
    predict, seen = setting.denoiser.predict_x0, []

    def watched(x, sigma, cond):
        x0 = predict(x, sigma, cond)
        seen.append((x.requires_grad, x0.requires_grad))
        return x0

    setting.denoiser.predict_x0 = watched
    setting.loss()
    assert seen == [(False, False)] * (STEPS - 3) + [(False, True)] + [(True, True)] * 2


@pytest.mark.parametrize("path", [VE, FLOW], ids=["VE", "FLOW"])
def test_quadratic_reward_moves_the_mean_to_its_optimum(affine, path):
    # x0 of the exact sampler is A z + B theta: the mean reward -(x0 - c)^2 is best where the mean sample is c.
    setting, c = Setting(affine, path, truncation="fixed", last=STEPS), 1.5
    setting.batch = Batch(Draws(3, 0, tuple(range(8))), (1, 8, 8), None, prompts=("a",) * 8)
    setting.objective.reward = lambda x, prompts, batch: -(x - c).square().flatten(1).mean(1)
    theta = THETA
    for _ in range(30):
        setting.place(theta)
        theta += 0.4 * setting.slope()
    setting.place(0.0)
    setting.objective.reward = lambda x, prompts, batch: x.flatten(1).mean(1)
    offset = setting.loss().metrics["reward"].item()
    assert theta == pytest.approx((c - offset) / TABLE[STEPS], abs=1e-3)


def test_target_stops_the_pull(affine):
    setting = Setting(affine, VE, truncation="fixed", last=STEPS, loss="target", target=50.0)
    assert setting.slope() == pytest.approx(TABLE[STEPS], abs=1e-4)
    setting.objective.config = AlignPropConfig(
        steps=STEPS, cfg=1.0, truncation="fixed", last=STEPS, loss="target", target=-50.0
    )
    assert setting.slope() == pytest.approx(-TABLE[STEPS], abs=1e-4)


def test_a_batch_of_four_is_four_batches(affine, path):
    setting = Setting(affine, path, sampler="ancestral")
    whole = setting.slope()
    parts = []
    for i in range(4):
        setting.batch = Batch(Draws(3, 0, (i,)), (1, 2, 2), None, prompts=("a",))
        parts.append(setting.slope())
    assert whole == pytest.approx(statistics.mean(parts), rel=1e-4)


def test_a_missing_reward_and_bad_settings_are_named(affine):
    setting = Setting(affine, VE)
    setting.objective.reward = None
    with pytest.raises(ValueError, match="connect `reward`"):
        setting.objective.prepare([])
    bad = {"steps": 0, "cfg": -1.0, "last": 30, "truncation": "some", "loss": "l2", "sampler": "sde", "target": 1e9}
    for name, value in bad.items():
        with pytest.raises(ValueError, match=name):
            AlignPropConfig(**{name: value})
