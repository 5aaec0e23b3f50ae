"""DMD2's GAN: its gradient, its discriminator, and what trains what."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from one_level import FREE, MIDDLE, SCALAR, at

from retort.sampling.path import FLOW, VE, VP
from retort.trainers.objectives.dmd2 import DMD2, DMD2Config
from retort.trainers.objectives.parts.contract import Draws, alpha_sigma


class OptimalCritic:
    """The logit that a perfect discriminator would have, of samples of one element."""

    def critic(self, batch, x_t, sigma):
        return self.denoiser.log_ratio(x_t, sigma)


@pytest.mark.parametrize("path", [VE, FLOW, VP], ids=["VE", "FLOW", "VP"])
def test_the_gan_pulls_as_softened_reverse_kl(exact, quadrature, nodes, path):
    gradients = []
    for weight in (0.0, 1.0):
        kind, z, noise = quadrature(type("Optimal", (OptimalCritic, DMD2), {}))
        denoiser = exact(path, mean=0.4, std=0.8)
        denoiser.set_student(1.4, 0.7)
        given = {"start": z, "matching noise": noise, "gan noise": noise, "gan level": 0.6, "matching level": 0.0}
        objective = kind(DMD2Config(gan_weight=weight, **FREE, **MIDDLE), denoiser)
        batch = at(len(z), draws=nodes(len(z), given), latents=torch.zeros(len(z), *SCALAR))
        with torch.no_grad():
            call = objective._simulate(batch)
            with denoiser.adapter("student"):
                x = denoiser.predict_x0(call.x, call.sigma, None)
        g, metrics = objective._gradient(batch, x, call.level)
        loss = objective._student(batch, call, g, metrics)
        with denoiser.adapter("student"):
            loss.value.backward()
        gradients.append(torch.tensor(denoiser.gradient()))
    sigma = denoiser.levels.drawn(torch.tensor([0.6]))
    a, s = (float(v) for v in alpha_sigma(path, sigma))
    # E_q[(s_q - s_p) / (1 + r) dx_t], by a sum over x_t = a (A z + b) + s n in the direction of the student.
    _, z, noise = quadrature(DMD2)
    chance = torch.exp(-(z.double() ** 2 + noise.double() ** 2) / 2)
    chance /= chance.sum()
    x_t = a * (1.4 * z.double() + 0.7) + s * noise.double()
    p, q = a**2 * 0.64 + s**2, a**2 * 1.96 + s**2
    r = torch.exp(-((x_t - a * 0.4) ** 2) / (2 * p) + (x_t - a * 0.7) ** 2 / (2 * q)) * math.sqrt(q / p)
    push = chance / (1 + r) * ((x_t - a * 0.4) / p - (x_t - a * 0.7) / q) * a
    want = torch.stack([(push * z).sum(), push.sum()]).float()
    torch.testing.assert_close(gradients[1] - gradients[0], want, atol=3e-5, rtol=1e-4)


class Featured:
    """Waves of x as the features of a scalar, so that a head has something to look at."""

    def features(self, x, sigma, cond):
        a, _ = alpha_sigma(self.path, sigma)
        u = (x * a.view(-1, 1, 1, 1) if self.path.kind == "VE" else x)[:, :, 0, 0]
        ways = torch.linspace(-2, 2, 24)
        scale = 1 + 0.1 * self.network(x, sigma)[:, :, 0, 0]
        return [torch.tanh(u - ways).mul(scale)[:, :, None, None], torch.tanh(2 * (u - ways)).unsqueeze(1)]

    def feature_widths(self, x, sigma, cond):
        return [24, 24]


@pytest.mark.parametrize("gan_on", ["teacher", "fake"])
def test_the_discriminator_learns_the_log_ratio(exact, nodes, gan_on):
    denoiser = type("Denoiser", (Featured, exact), {})(VE, mean=0.4, std=0.6)
    denoiser.set_student(1.2, -0.2)
    objective = DMD2(DMD2Config(gan_weight=1.0, gan_on=gan_on, cfg=1.0, ratio=1000), denoiser)
    one = {"critic level, real": 0.3, "critic level, fake": 0.3}

    def batch(step):
        draws = nodes(512, one, seed=step)
        latents = 0.4 + 0.6 * draws.normal("data", SCALAR)
        return at(512, draws=draws, latents=latents)

    objective.prepare([batch(0)])
    weights = list(objective.players["fake"].modules.parameters())
    optimiser = torch.optim.Adam(weights, lr=6e-3)
    right = []
    for step in range(200):
        for kind, x0 in (("fake", None), ("real", batch(step).latents)):
            b = batch(step)
            x0 = 1.2 * b.draws.normal("start", SCALAR) - 0.2 if x0 is None else x0
            loss = objective._critic(b, x0, kind)
            loss.value.backward()
            right.append(float(loss.metrics[f"critic_right_{kind}"]))
        optimiser.param_groups[0]["lr"] = 6e-3 * (1 - step / 200)
        optimiser.step()
        optimiser.zero_grad()
    assert sum(right[-50:]) / 50 > sum(right[:2]) / 2
    sigma = denoiser.levels.drawn(torch.full((200,), 0.3))
    x0 = 1.2 * torch.randn(200, *SCALAR, generator=torch.Generator().manual_seed(5)) - 0.2
    x_t = denoiser.path.add_noise(x0, sigma, torch.zeros_like(x0))
    with torch.no_grad():
        learnt, true = objective.critic(at(200), x_t, sigma), denoiser.log_ratio(x_t, sigma)
    slope = float(((learnt - learnt.mean()) * (true - true.mean())).sum() / (true - true.mean()).square().sum())
    fit = float(torch.corrcoef(torch.stack([learnt, true]))[0, 1] ** 2)
    assert slope == pytest.approx(1.0, abs=0.15)
    assert fit > 0.97


@pytest.mark.parametrize(("gan_on", "learns"), [("teacher", False), ("fake", True)])
def test_the_critics_loss_reaches_the_fake_adapter_only_where_it_judges(tiny, gan_on, learns):
    denoiser = tiny()
    objective = DMD2(DMD2Config(gan_weight=1.0, gan_on=gan_on), denoiser)
    draws = Draws(0, 0, (0, 1))
    batch = at(2, 1.0, 0.0, draws, shape=(3, 4, 4), latents=torch.randn(2, 3, 4, 4))
    objective.prepare([batch])
    objective.discriminator.double()
    torch.nn.init.normal_(objective.discriminator.heads[0].whole[-1].weight)
    losses = objective._critic(batch, batch.latents, "real")
    with denoiser.adapter("fake"):
        losses.value.backward()
    assert all(p.grad is not None for p in objective.discriminator.parameters())
    got = [p.grad for p in denoiser.adapters.parameters("fake").values()]
    assert any(g is not None and bool(g.abs().sum() > 0) for g in got) == learns
    assert all(p.grad is None for p in denoiser.adapters.parameters("student").values())


@pytest.mark.parametrize("gan_on", ["teacher", "fake"])
def test_the_pull_is_the_gradient_of_the_generators_loss(tiny, gan_on):
    found = []
    batch = at(2, 1.0, 0.0, Draws(0, 0, (0, 1)), shape=(3, 4, 4))
    for weight in (0.0, 0.5):
        denoiser = tiny()
        for p in denoiser.adapters.parameters("fake").values():
            torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(p.numel()))
        objective = DMD2(DMD2Config(gan_weight=weight, gan_on=gan_on), denoiser)
        objective.prepare([batch])
        if weight:
            objective.discriminator.double()
            for head in objective.discriminator.heads:
                torch.nn.init.normal_(head.whole[-1].weight, generator=torch.Generator().manual_seed(1))
        for loss in objective.losses(dataclasses.replace(batch, latents=torch.zeros(2, 3, 4, 4)), 0):
            with denoiser.adapter(loss.player):
                loss.value.backward()
        found.append([p.grad for p in denoiser.adapters.parameters("student").values()])
    # Without checkpoints one graph through both networks is allowed, and says what the product must be.
    call = objective._simulate(batch)
    with denoiser.adapter("student"):
        x = denoiser.predict_x0(call.x, call.sigma, batch.cond)
    sigma = denoiser.levels.drawn(batch.draws.uniform("gan level"))
    x_t = denoiser.path.add_noise(x, sigma, batch.draws.normal("gan noise", (3, 4, 4)))
    with denoiser.adapter("fake" if gan_on == "fake" else None):
        loss = 0.5 * torch.nn.functional.softplus(-objective.critic(batch, x_t, sigma)).mean()
    # autograd.grad asks for requires_grad, which follows the adapter; the graph itself is whole.
    with denoiser.adapter("student"):
        want = torch.autograd.grad(loss, list(denoiser.adapters.parameters("student").values()))
    for without, with_gan, gradient in zip(*found, want, strict=True):
        assert bool(gradient.abs().max() > 0)
        torch.testing.assert_close(with_gan - without, gradient, rtol=1e-6, atol=1e-12)
