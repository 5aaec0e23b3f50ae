"""Plain fine-tuning: spaces of the loss, levels, Student-t noise, and what the optimum on Gaussian data is."""

from __future__ import annotations

import math

import pytest
import torch
from gradients import same_with_checkpoints, three_latents
from scipy import stats

from retort.sampling.path import FLOW, VE
from retort.sampling.schedule import FlowSchedule
from retort.sampling.student_t import student_t
from retort.trainers.objectives.flow_matching import FlowMatching, FlowMatchingConfig, quantile
from retort.trainers.objectives.parts.contract import Batch, Draws

SHAPE = (1, 8, 8)


def _batch(count=8, step=0, first=0, shape=SHAPE, mean=0.5, std=0.7, seed=3):
    draws = Draws(seed, step, tuple(range(first, first + count)))
    return Batch(draws, shape, cond=None, latents=mean + std * draws.normal("data", shape))


def _loss(denoiser, batch, **config):
    return next(iter(FlowMatching(FlowMatchingConfig(**config), denoiser).losses(batch, 0)))


def test_x0_loss_is_the_native_loss_times_the_scale_squared(affine, path):
    denoiser = affine(path, std=0.7)
    denoiser.set_affine("student", 0.3, -0.2)
    for index in range(6):
        batch = _batch(1, first=index)
        # The network's own error from its own target: the identity is checked, not assumed.
        native, x0 = (_loss(denoiser, batch, loss_space=space, max_weight=1e8).value for space in ("native", "x0"))
        objective = FlowMatching(FlowMatchingConfig(), denoiser)
        sigma = objective.sigma(batch.draws)
        noise = batch.draws.normal("noise", SHAPE)
        x = path.add_noise(batch.latents, sigma, noise)
        with denoiser.adapter("student"):
            predicted = denoiser.predict_x0(x, sigma, None)
        if path.kind == "VP":  # v = a n - s x0
            a = 1 / (1 + sigma**2).sqrt()
            s = sigma * a
            error = (a * x - predicted) / s - (a * noise - s * batch.latents)
        else:  # eps on VE; noise - x0 on FLOW
            target = noise if path.kind == "VE" else noise - batch.latents
            error = (x - predicted) / sigma - target
        assert native.item() == pytest.approx(error.square().mean().item(), rel=2e-3)
        scale = denoiser.parametrisation.scale(sigma)
        assert x0.item() == pytest.approx((scale.square() * native).item(), rel=1e-5)


def _slopes(denoiser, w, c, batch, **config):
    """d loss / d (w, c) of the student's affine part: B of its LoRA is one, A holds the numbers."""
    denoiser.set_affine("student", w, c)
    row = denoiser.adapters.parameters("student")["blocks.0.affine.lora_A.weight"]
    row.grad = None
    loss = _loss(denoiser, batch, **config)
    with denoiser.adapter("student"):
        loss.value.backward()
    return row.grad.clone()


@pytest.mark.parametrize("space", ["native", "x0"])
def test_the_teacher_is_the_optimum_on_its_own_data(affine, path, space):
    denoiser, batch = affine(path, mean=0.5, std=0.7), _batch(128, shape=(1, 48, 48))
    away = _slopes(denoiser, 0.2, 0.2, batch, loss_space=space).abs()
    here = _slopes(denoiser, 0.0, 0.0, batch, loss_space=space).abs()
    assert (here < 0.02 * away).all()


def test_the_slope_is_the_finite_difference(affine, path):
    denoiser, batch = affine(path, mean=0.5, std=0.7), _batch(4)
    slope = _slopes(denoiser, 0.2, -0.1, batch, levels="logit_normal", std=0.4)
    for k, (dw, dc) in enumerate(((1e-2, 0.0), (0.0, 1e-2))):
        values = []
        for sign in (1, -1):
            denoiser.set_affine("student", 0.2 + sign * dw, -0.1 + sign * dc)
            values.append(_loss(denoiser, batch, levels="logit_normal", std=0.4).value.item())
        assert slope[0, k].item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=2e-3)


def test_levels(affine):
    draws = Draws(0, 0, tuple(range(4000)))
    uniform = FlowMatching(FlowMatchingConfig(), affine(FLOW)).sigma(draws)
    assert uniform.min() > 0 and uniform.max() <= 1
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 0.01

    shifted = affine(FLOW)
    shifted.schedule = FlowSchedule(shift=3.0)
    core = FlowMatching(FlowMatchingConfig(levels="core"), shifted).sigma(draws)
    assert torch.allclose(core, 3 * uniform / (1 + 2 * uniform))
    assert torch.equal(FlowMatching(FlowMatchingConfig(), shifted).sigma(draws), uniform)

    config = FlowMatchingConfig(levels="logit_normal", mean=0.4, std=1.3)
    logit = FlowMatching(config, affine(FLOW)).sigma(draws).double().logit()
    assert stats.kstest(logit.numpy(), "norm", (0.4, 1.3)).pvalue > 0.01

    eps = affine(VE)
    table = eps.schedule.sigmas
    sigma = FlowMatching(FlowMatchingConfig(), eps).sigma(draws)
    t = eps.schedule.timestep(sigma)
    assert torch.allclose(table[t], sigma, rtol=1e-5) and t.min() < 4 and t.max() > 995
    assert stats.kstest((t.numpy() + 0.5) / 1000, "uniform").pvalue > 0.01
    core = FlowMatching(FlowMatchingConfig(levels="core"), eps).sigma(draws)
    assert torch.allclose(core, eps.schedule.sigma((1 - draws.uniform("level")) * 999))


@pytest.mark.parametrize(("numbers", "dim"), [(64, 5), (64, 128), (3072, 128)])
def test_student_t_noise_has_the_f_distribution(numbers, dim):
    draws = Draws(1, 0, tuple(range(1500)))
    n = student_t(draws.normal("noise", (numbers,)), quantile(draws), dim)
    ratio = n.double().square().mean(1)
    assert stats.kstest(ratio.numpy(), stats.f(numbers, dim).cdf).pvalue > 0.01
    assert (
        stats.kstest(draws.normal("noise", (numbers,)).double().square().sum(1), stats.chi2(numbers).cdf).pvalue > 0.01
    )


def test_infinite_dimension_is_gaussian_noise(affine, path):
    draws = Draws(1, 0, (0, 1, 2))
    z = draws.normal("noise", SHAPE)
    assert student_t(z, quantile(draws), 0) is z and student_t(z, quantile(draws), math.inf) is z
    assert torch.allclose(student_t(z, quantile(draws), 1e12), z, rtol=1e-5)
    denoiser, batch = affine(path), _batch()
    assert torch.allclose(_loss(denoiser, batch).value, _loss(denoiser, batch, aug_dim=1e12).value, rtol=1e-4)


@pytest.mark.parametrize("aug_dim", [0.0, 64.0])
def test_a_batch_of_eight_is_eight_batches(affine, path, aug_dim):
    denoiser = affine(path)
    whole = _slopes(denoiser, 0.2, 0.1, _batch(8), aug_dim=aug_dim)
    parts = sum(_slopes(denoiser, 0.2, 0.1, _batch(1, first=i), aug_dim=aug_dim) for i in range(8)) / 8
    assert torch.allclose(whole, parts, rtol=1e-5)


def test_checkpointing_changes_no_gradient(tiny, path):
    denoiser = tiny(path)
    objective = FlowMatching(FlowMatchingConfig(), denoiser)
    batch = three_latents()
    same_with_checkpoints(objective, batch)


def test_preview_is_the_data(affine, path):
    denoiser = affine(path, mean=0.5, std=0.7)
    objective = FlowMatching(FlowMatchingConfig(steps=200, cfg=1.0), denoiser)
    with denoiser.adapter("student"):
        x = objective.sample(torch.randn(1, 1, 100, 100, generator=torch.Generator().manual_seed(0)), None, None)
    # A start of pure noise lacks the 0.068 of the mean that the highest level of eps models still carries.
    assert x.mean().item() == pytest.approx(0.5, abs=0.05) and x.std().item() == pytest.approx(0.7, abs=0.03)


def test_preview_guides_when_it_can(affine, path):
    denoiser = affine(path, mean=0.0, std=0.7)
    objective = FlowMatching(FlowMatchingConfig(steps=50, cfg=3.0), denoiser)
    cond, uncond = {"mean": torch.ones(1)}, {"mean": torch.zeros(1)}
    noise = torch.zeros(1, *SHAPE)
    with denoiser.adapter("student"):
        plain, far = objective.sample(noise, cond, None), objective.sample(noise, cond, uncond)
    assert far.mean().item() == pytest.approx(3 * plain.mean().item(), rel=1e-3)


def test_bad_settings_are_named():
    bad = {
        "loss_space": "eps", "levels": "cosine", "mean": 11.0, "std": 0.0, "max_weight": 0.5, "aug_dim": 2.0,
        "steps": 0, "cfg": -1.0,
    }  # fmt: skip
    for field, value in bad.items():
        with pytest.raises(ValueError, match=field):
            FlowMatchingConfig(**{field: value})
