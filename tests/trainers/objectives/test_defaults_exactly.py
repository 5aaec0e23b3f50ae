"""Gradients and losses with the settings that a node has from the start, on latents of many numbers, by their formulas.

The formulas are written out here from the papers, in double precision, on a small random network whose teacher, fake
score and student differ. Only draws and levels are the product's own, which have tests of their own.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from retort.sampling.path import FLOW, VE
from retort.trainers.objectives.di_star import DIStar, DIStarConfig
from retort.trainers.objectives.dmd2 import DMD2, DMD2Config
from retort.trainers.objectives.dpo import DPO, DPOConfig
from retort.trainers.objectives.fdistill import FDistill, FDistillConfig
from retort.trainers.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from retort.trainers.objectives.instarevive import InstaRevive, InstaReviveConfig
from retort.trainers.objectives.parts.contract import Batch, Draws
from retort.trainers.objectives.tdm import TDM, TDMConfig

SHAPE, COUNT = (3, 4, 5), 3
NUMBERS = math.prod(SHAPE)
BOTH = pytest.mark.parametrize("path", [VE, FLOW], ids=["VE", "FLOW"])


@pytest.fixture
def network(tiny):
    """network(path) -> a denoiser whose fake score and student are neither the teacher nor each other."""

    def make(path):
        denoiser = tiny(path)
        for key, weight in denoiser.adapters.parameters("fake").items():
            if "lora_B" in key:
                nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(7 + len(key)))
        return denoiser

    return make


def batch_of(**more) -> Batch:
    told = [{"mean": torch.linspace(low, high, COUNT)} for low, high in ((0.2, 1.0), (-0.5, -0.1))]
    return Batch(Draws(5, 0, tuple(range(COUNT))), SHAPE, *told, prompts=("a", "b", "c"), **more)


def some(seed: int) -> torch.Tensor:
    return torch.randn(COUNT, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def per(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def mean(x: torch.Tensor) -> torch.Tensor:
    """Of each sample's numbers, shaped to multiply it."""
    return x.mean((1, 2, 3), keepdim=True)


def noisy(path, x0, sigma, noise):
    """x at sigma in ComfyUI's coordinates, independent of NoisePath."""
    sigma = per(sigma).double()
    return (1 - sigma) * x0 + sigma * noise if path.kind == "FLOW" else x0 + sigma * noise


def ask(denoiser, adapter, x, sigma, cond):
    with denoiser.adapter(adapter):
        return denoiser.predict_x0(x, sigma, cond)


def matched(denoiser, config, batch, x):
    """(x at the level of the matching term, that level)."""
    sigma = denoiser.levels.drawn(batch.draws.uniform("matching level"), config.low, config.high, config.shift)
    return noisy(denoiser.path, x, sigma, batch.draws.normal("matching noise", SHAPE)), sigma


def learnt(denoiser, loss) -> list[torch.Tensor]:
    """The gradients of the student's weights."""
    assert loss.player == "student"
    with denoiser.adapter("student"):
        weights = list(denoiser.adapters.parameters("student").values())
        return list(torch.autograd.grad(loss.value, weights))


def expected(denoiser, call, batch, g) -> list[torch.Tensor]:
    """What a student whose samples are to move against g learns: the mean over samples and their numbers."""
    with denoiser.adapter("student"):
        x = denoiser.predict_x0(call.x, call.sigma, batch.cond)
        weights = list(denoiser.adapters.parameters("student").values())
        return list(torch.autograd.grad((g.detach() * x).sum() / x.numel(), weights))


def same(got, wanted) -> None:
    largest = max(float(w.abs().max()) for w in wanted)
    assert largest > 1e-4
    # Levels are in single precision.
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * largest)


def made(denoiser, objective, batch):
    """(the student's call, its sample)."""
    call = objective._simulate(batch)
    with torch.no_grad():
        return call, ask(denoiser, "student", call.x, call.sigma, batch.cond)


@BOTH
@pytest.mark.parametrize("space", ["x0", "score"])
@pytest.mark.parametrize("guidance", ["in", "out"])
def test_di_star_moves_by_distance_guidance_and_reward(network, path, guidance, space):
    """The whole gradient over mean |x0 - guided teacher|, less alpha times the reward's slope times a latent's size."""
    denoiser, batch, alpha = network(path), batch_of(), 0.05
    config = DIStarConfig(guidance=guidance, space=space, alpha_rew=alpha)
    assert config.normalise and config.cfg > 1 and config.distance == "pseudo_huber"
    objective = DIStar(config, denoiser)
    slope = some(3)
    objective.reward = lambda x, prompts, batch: (slope * x).mean((1, 2, 3)) + 0.1 * x.square().mean((1, 2, 3))
    call, x = made(denoiser, objective, batch)

    leaf = x.clone().requires_grad_()
    x_t, sigma = matched(denoiser, config, batch, leaf)
    fake = ask(denoiser, "fake", x_t, sigma, batch.cond)
    real, without = (ask(denoiser, None, x_t, sigma, told) for told in (batch.cond, batch.uncond))
    target = without + config.cfg * (real - without)
    level = per(sigma).double()
    # a and s of x_t = a x0 + s n, as the paper writes it.
    a, s = (1 - level, level) if path is FLOW else (1 / (1 + level**2).sqrt(), level / (1 + level**2).sqrt())
    to_score = a / s**2 if space == "score" else torch.ones_like(a)
    y = to_score * (fake - (target if guidance == "in" else real))
    surrogate = -(y / (mean(y**2) + config.huber**2).sqrt() * to_score * (fake - leaf)).sum()
    (g,) = torch.autograd.grad(surrogate, leaf)
    if guidance == "out":
        weight = (a / s) ** 2 if space == "score" else 1.0
        g = g - (config.cfg - 1) * weight * (real - without).detach()
    g = g / mean((x - target.detach()).abs())
    g = g - alpha * NUMBERS * (slope + 0.2 * x) / NUMBERS
    same(learnt(denoiser, next(iter(objective.losses(batch, 0)))), expected(denoiser, call, batch, g))


@BOTH
def test_tdm_s_student_learns_by_a_pseudo_huber_loss_over_its_distance_from_the_teacher(network, path):
    """mean(sqrt(d^2 + c^2) - c) / mean |x0 - guided teacher|, d from x0 + teacher - fake."""
    denoiser, batch, config = network(path), batch_of(), TDMConfig(steps=4)
    assert config.normalise and config.huber == 1e-3 and config.cfg > 1
    objective = TDM(config, denoiser)
    sigmas, pick = objective.grids[4], batch.draws.integers("pick", 0, 4)
    x, sigma = objective.rollout(batch, sigmas, pick), sigmas[pick]
    mid, tau = objective.levels(batch, sigmas, pick)
    with torch.no_grad():
        x0 = ask(denoiser, "student", x, sigma, batch.cond)
        there = x + (x - x0) / per(sigma) * per(mid - sigma)
        low, high, noise = per(mid).double(), per(tau).double(), batch.draws.normal("tau_noise", SHAPE)
        # Fresh noise from the level of the state up to tau's.
        keep = (1 - high) / (1 - low) if path is FLOW else torch.ones_like(low)
        x_tau = keep * there + (high**2 - (keep * low) ** 2).sqrt() * noise
        fake = ask(denoiser, "fake", x_tau, tau, batch.cond)
        real, without = (ask(denoiser, None, x_tau, tau, told) for told in (batch.cond, batch.uncond))
        real = without + config.cfg * (real - without)
        scale = mean((x0 - real).abs())
        d = fake - real
    fakes, student = objective.losses(batch, 0)
    value = (((d**2 + config.huber**2).sqrt() - config.huber) / scale).mean()
    assert student.value.item() == pytest.approx(float(value), rel=1e-6)
    assert fakes.player == "fake"
    with denoiser.adapter("student"):
        again = denoiser.predict_x0(x, sigma, batch.cond)
        g = d / (d**2 + config.huber**2).sqrt() / scale
        weights = list(denoiser.adapters.parameters("student").values())
        wanted = torch.autograd.grad((g * again).sum() / again.numel(), weights)
    same(learnt(denoiser, student), wanted)


def matching(denoiser, config, batch, x):
    """(fake - teacher, guidance in x0, x's distance from the guided teacher) at the level of the matching term."""
    with torch.no_grad():
        x_t, sigma = matched(denoiser, config, batch, x)
        fake = ask(denoiser, "fake", x_t, sigma, batch.cond)
        real, without = (ask(denoiser, None, x_t, sigma, told) for told in (batch.cond, batch.uncond))
        guidance = (config.cfg - 1) * (real - without)
    return fake, real, guidance


@BOTH
@pytest.mark.parametrize("decoupled", [False, True])
def test_dmd2_s_guidance_has_the_guided_teacher_s_distance_for_its_unit(network, path, decoupled):
    denoiser, batch, config = network(path), batch_of(), DMD2Config(steps=4, decoupled=decoupled)
    assert config.normalise and config.cfg > 1
    objective = DMD2(config, denoiser)
    call, x = made(denoiser, objective, batch)
    fake, real, guidance = matching(denoiser, config, batch, x)
    if not decoupled:
        g = (fake - real - guidance) / mean((x - real - guidance).abs())
    else:
        high = min(config.high, denoiser.levels.place(call.level))
        sigma = denoiser.levels.drawn(batch.draws.uniform("guidance level"), min(config.low, high), high)
        x_t = noisy(path, x, sigma, batch.draws.normal("guidance noise", SHAPE))
        with torch.no_grad():
            told, without = (ask(denoiser, None, x_t, sigma, cond) for cond in (batch.cond, batch.uncond))
        guidance = (config.cfg - 1) * (told - without)
        g = (fake - real) / mean((x - real).abs()) - guidance / mean((x - told - guidance).abs())
    same(learnt(denoiser, next(iter(objective.losses(batch, 0)))), expected(denoiser, call, batch, g))


@BOTH
@pytest.mark.parametrize("on", ["teacher", "fake"])
def test_the_critic_s_loss_weighs_a_hundredth(network, path, on):
    """0.01 (softplus(-D(real)) + softplus(D(fake))), beside a score loss of weight 1."""
    denoiser, batch = network(path), batch_of(latents=some(4))
    objective = DMD2(DMD2Config(steps=4, gan_weight=5e-3, gan_on=on), denoiser)
    objective.prepare([batch])
    objective.discriminator.double()
    _, x = made(denoiser, objective, batch)
    total = 0.0
    for kind, clean, sign in (("fake", x, 1), ("real", batch.latents, -1)):
        sigma = denoiser.levels.drawn(batch.draws.uniform(f"critic level, {kind}"))
        x_t = noisy(path, clean, sigma, batch.draws.normal(f"critic noise, {kind}", SHAPE))
        with torch.no_grad(), denoiser.adapter("fake" if on == "fake" else None):
            logits = objective.discriminator(denoiser.features(x_t, sigma, batch.cond))
        total += float(torch.log1p((sign * logits).exp()).mean())
    critics = [loss.value.item() for loss in objective.losses(batch, 1) if "score_loss" not in loss.metrics]
    assert sum(critics) == pytest.approx(0.01 * total, rel=1e-5)


@BOTH
def test_instarevive_adds_the_feature_loss_as_a_mean_over_samples(network, path):
    """Its slope counts a latent's size times beside pulls that are means over a latent's numbers."""
    columns = {"degraded": some(8)}
    denoiser, batch = network(path), batch_of(latents=some(4), columns=columns)
    config = InstaReviveConfig(feature_weight=0.7)
    assert config.normalise and config.dynamic and config.matching_weight == config.regression_weight == 1
    objective = InstaRevive(config, denoiser)
    objective.features = lambda x, clean: (x - clean).square().mean((1, 2, 3)).sqrt()
    objective.after_step({"input_distance": 2.0, "distance": 0.5}, 0)
    share = config.floor + (1 - config.floor) * 0.25
    call, x = made(denoiser, objective, batch)
    high = config.narrow + (config.high - config.narrow) * 0.25
    fake, real, guidance = matching(denoiser, InstaReviveConfig(high=high), batch, x)
    away = x - batch.latents
    g = (fake - real - guidance) / mean((x - real - guidance).abs())
    g = g + share * away + 0.7 * share * NUMBERS * away / (NUMBERS * mean(away**2).sqrt())
    same(learnt(denoiser, next(iter(objective.losses(batch, 0)))), expected(denoiser, call, batch, g))


@BOTH
@pytest.mark.parametrize("level", [1e-3, 9e-3, 0.02, 0.6])
def test_pairs_are_compared_in_the_network_s_output_down_to_a_scale_of_a_hundredth(network, path, level):
    denoiser, batch = network(path), batch_of()
    pair, noises, sigma = (some(1), some(2)), (some(3), some(4)), torch.full((COUNT,), level)
    with torch.no_grad(), denoiser.adapter("student"):
        errors = DPO(DPOConfig(), denoiser).errors(pair, sigma, noises, batch.cond)
        for error, x0, noise in zip(errors, pair, noises, strict=True):
            off = denoiser.predict_x0(noisy(path, x0, sigma, noise), sigma, batch.cond) - x0
            torch.testing.assert_close(error, (off**2).mean((1, 2, 3)) / max(level, 0.01) ** 2, rtol=1e-5, atol=0)


@BOTH
def test_fine_tuning_draws_every_timestep_equally_often(network, nodes, path):
    """Of a thousand evenly spread numbers each timestep gets one, 0 and 999 too; a flow's level is spread itself."""
    denoiser = network(path)
    middles = (torch.arange(1000) + 0.5) / 1000
    drawn = FlowMatching(FlowMatchingConfig(), denoiser).sigma(nodes(1000, {"level": middles})).sort().values
    wanted = middles if path is FLOW else denoiser.schedule.sigmas
    torch.testing.assert_close(drawn, wanted.to(drawn), rtol=1e-5, atol=1e-7)


def test_the_student_and_the_fake_score_of_these_tests_differ_from_the_teacher(network):
    denoiser, batch = network(VE), batch_of()
    with torch.no_grad():
        answers = [ask(denoiser, who, some(1), torch.ones(COUNT), batch.cond) for who in (None, "fake", "student")]
    assert all(float((one - answers[0]).abs().mean()) > 0.01 for one in answers[1:])


@BOTH
def test_f_distill_s_running_means_are_of_clipped_ratios_in_tenths_of_the_range(network, path):
    """r clipped to 0.1 .. 20 over its tenth's running mean of clipped r; h = r / (1 + r) over its own running mean."""
    config = FDistillConfig()
    assert config.ratio_normalise and config.divergence == "jensen_shannon"
    objective = FDistill(config, network(path))
    steps = [([8.0, 2.0, -7.0, 0.5, 1.0], [0.02, 0.07, 0.16, 0.99, 0.44]),
             ([1.5, 9.0, -0.3, -9.0, 0.2], [0.06, 0.09, 0.11, 0.94, 0.46])]  # fmt: skip
    bins: dict[int, list[float]] = {}
    total = seen = 0.0
    for logits, places in steps:
        clipped = [min(max(math.exp(logit), 0.1), 20.0) for logit in logits]
        tenths = [math.floor(10 * place) for place in places]
        ratios = [r / (bins[t][0] / bins[t][1] if t in bins else 1.0) for r, t in zip(clipped, tenths, strict=True)]
        h = [r / (1 + r) for r in ratios]
        wanted = torch.tensor([x / (total / seen if seen else 0.5) for x in h])
        g = torch.ones(5, *SHAPE)
        weighted, metrics = objective.weighted(g, torch.tensor(logits), torch.tensor(places))
        torch.testing.assert_close(weighted, per(wanted).expand_as(g), rtol=1e-4, atol=0)
        objective.after_step({name: float(value) for name, value in metrics.items()}, 0)
        # Sums and counts, both decayed, and only where something was seen.
        for t in set(tenths):
            mine = [r for r, other in zip(clipped, tenths, strict=True) if other == t]
            old = bins.get(t, [0.0, 0.0])
            bins[t] = [0.9 * old[0] + 0.1 * sum(mine) / 5, 0.9 * old[1] + 0.1 * len(mine) / 5]
        total, seen = 0.9 * total + 0.1 * sum(h) / 5, 0.9 * seen + 0.1
