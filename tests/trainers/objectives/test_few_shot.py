"""Few-shot adaptation: the phases' weights, the consistency's zero, and gradients against autograd."""

from __future__ import annotations

import pytest
import torch
from gradients import same_with_checkpoints, three_latents

from retort.sampling.path import FLOW, VE
from retort.trainers.objectives.few_shot import (
    FewShot,
    FewShotConfig,
    content_share,
    content_weight,
    diffusion_weight,
    directional_consistency,
)
from retort.trainers.objectives.parts.contract import Batch, Draws

SHAPE = (2, 4, 4)


def _batch(indices=(0, 1, 2), step=0, seed=5, mean=1.0):
    draws = Draws(seed, step, tuple(indices))
    cond = {"mean": torch.linspace(0, 1, 8)[list(indices)]}
    return Batch(draws, SHAPE, cond, latents=mean + 0.3 * draws.normal("data", SHAPE))


def _run(objective, batch, step=0):
    """The student's gradient of all the step's losses, and the metrics."""
    row = objective.denoiser.adapters.parameters("student")["blocks.0.affine.lora_A.weight"]
    row.grad, metrics = None, {}
    for loss in objective.losses(batch, step):
        with objective.denoiser.adapter(loss.player):
            loss.value.backward()
        metrics |= loss.metrics
    return row.grad.clone(), metrics


def _embed(latents, batch):
    return torch.stack([latents.flatten(1).sin().mean(1), latents.flatten(1).square().mean(1)], 1)


def test_weights_of_the_phases():
    t = torch.tensor([290.0, 300.0, 310.0, 0.0, 800.0, 900.0])
    m = content_share(t, 300.0)
    assert m[1].item() == 0.5 and m[0].item() == pytest.approx(4.5e-5, rel=1e-2)
    assert m[2].item() == pytest.approx(1 - 4.5e-5) and m[3].item() == 0.0
    assert content_weight(t)[3].item() == 1.0 and content_weight(torch.tensor(1000.0)).item() == pytest.approx(20.0)
    assert diffusion_weight(t)[3].item() == pytest.approx(13.823, abs=1e-3)  # 20^0.9 = 14.823
    assert diffusion_weight(t)[5].item() == pytest.approx(0.0, abs=1e-5)
    assert (diffusion_weight(torch.arange(0.0, 800.0)) > 3).all()


def test_consistency_is_zero_when_the_picture_moved_by_the_direction():
    g = torch.Generator().manual_seed(0)
    source, w = torch.randn(5, 7, generator=g), torch.randn(7, generator=g)
    assert directional_consistency(source + w, source, w).abs().max() < 1e-12
    assert directional_consistency(source + w + 0.5, source, w).tolist() == pytest.approx([0.25] * 5, rel=1e-5)


def test_a_student_that_adds_the_direction_has_no_consistency_loss(affine, path):
    # E is the latent itself: an adapted model x0 + w is the zero of L_DDC, by the production path.
    denoiser = affine(path)
    objective = FewShot(FewShotConfig(), denoiser)
    objective.embed = lambda latents, batch: latents.flatten(1)
    objective.direction = torch.full((32,), 0.7)
    for c, zero in ((0.7, True), (0.6, False)):
        denoiser.set_affine("student", 0.0, c)
        loss = next(iter(objective.losses(_batch(), 0)))
        assert loss.metrics["consistency"].item() == pytest.approx(0.0 if zero else 0.01, abs=1e-6)


def test_direction_is_from_the_source_to_the_target(affine, path):
    objective = FewShot(FewShotConfig(source_steps=50), affine(path, mean=0.0, std=0.5))
    objective.embed = lambda latents, batch: latents.flatten(2).mean(2)
    batch = _batch(range(8), mean=2.0)
    batch.cond = None
    objective.prepare([batch])
    assert objective.direction.shape == (2,)
    assert objective.direction.tolist() == pytest.approx([2.0, 2.0], abs=0.25)
    again = FewShot(FewShotConfig(source_steps=50), objective.denoiser)
    again.embed = objective.embed
    objective.denoiser.set_affine("student", 0.4, 0.4)
    again.prepare([batch])
    assert torch.equal(again.direction, objective.direction)
    assert again.buffers()["direction"] is again.direction


def test_the_networks_own_features_are_the_default(affine):
    for path in (VE, FLOW):
        denoiser = affine(path)
        objective = FewShot(FewShotConfig(), denoiser)
        wide = torch.nn.Conv2d(2, 5, 1)

        def features(x, sigma, cond, wide=wide):
            return [wide(x), wide(x).flatten(2).transpose(1, 2)]

        denoiser.features = features
        objective.prepare([_batch()])
        assert objective.direction.shape == (10,)
        # Pooled over places in either layout.
        assert torch.allclose(objective.direction[:5], objective.direction[5:], atol=1e-5)
        denoiser.set_affine("student", 0.2, 0.1)
        slope, metrics = _run(objective, _batch())
        assert slope.abs().sum() > 0 and metrics["consistency"] > 0


def test_gradient_is_autograds_through_both_networks(affine, path):
    denoiser = affine(path, levels=(0.2, 0.6, 2.0))
    objective = FewShot(FewShotConfig(consistency=2.0), denoiser)
    objective.embed, batch = _embed, _batch()
    objective.prepare([batch])
    denoiser.set_affine("student", 0.2, 0.3)
    row = denoiser.adapters.parameters("student")["blocks.0.affine.lora_A.weight"]
    loss = next(iter(objective.losses(batch, 0)))
    row.grad = None
    with denoiser.adapter("student"):
        loss.value.backward()
    got = row.grad.clone()

    t = 800 - 500 * batch.draws.uniform("level")
    t = t if path is FLOW else (t - 1).clamp(min=300)
    sigma = t / 1000 if path is FLOW else denoiser.schedule.sigmas[t.long()]
    x = path.add_noise(objective._source(batch), sigma, batch.draws.normal("source noise", SHAPE))
    with torch.no_grad(), denoiser.adapter(None):
        source = _embed(denoiser.predict_x0(x, sigma, batch.cond), batch)
    row.grad = None
    with denoiser.adapter("student"):
        adapted = _embed(denoiser.predict_x0(x, sigma, batch.cond), batch)
        weight = 2.0 * content_weight(t) * content_share(t, 300.0)
        value = (weight * (adapted - source - objective.direction).square().mean(1)).mean()
        value.backward()
    assert loss.value.item() == pytest.approx(value.item(), rel=1e-4)
    assert torch.allclose(got, row.grad, rtol=1e-4, atol=1e-6)


def test_odd_steps_learn_style_at_low_levels(affine, path):
    denoiser = affine(path)
    denoiser.set_affine("student", 0.2, 0.3)
    objective, batch = FewShot(FewShotConfig(), denoiser), _batch(step=1)
    (loss,) = objective.losses(batch, 1)
    t = 300 - 300 * batch.draws.uniform("level")
    t = t if path is FLOW else (t - 1).clamp(min=0)
    sigma = t / 1000 if path is FLOW else denoiser.schedule.sigmas[t.long()]
    x = path.add_noise(batch.latents, sigma, batch.draws.normal("noise", SHAPE))
    with torch.no_grad(), denoiser.adapter("student"):
        error = denoiser.predict_x0(x, sigma, batch.cond) - batch.latents
    scale = denoiser.parametrisation.scale(sigma)
    each = error.square().flatten(1).mean(1) / scale.square()
    expected = ((20**0.9 - 20 ** (t / 1000)) / 5 * each).mean()
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-3)


def test_both_losses_of_an_even_step_are_at_high_levels(affine, path):
    objective = FewShot(FewShotConfig(), affine(path))
    seen, predict = [], objective.denoiser.predict_x0
    objective.embed, objective.config = _embed, FewShotConfig(source_steps=1)
    batch = _batch(range(8))
    objective.prepare([batch])
    objective.denoiser.predict_x0 = lambda x, sigma, cond: (seen.append(sigma), predict(x, sigma, cond))[1]
    list(objective.losses(batch, 0))
    # One call makes the source sample at the top; teacher, student, student again, and L_diff share their level.
    assert len(seen) == 5 and all(torch.equal(seen[1], level) for level in seen[2:])
    low, high = objective._sigma(torch.tensor([300.0, 800.0]))
    assert (seen[1] >= low).all() and (seen[1] <= high).all()


def test_without_consistency_it_is_phasic_fine_tuning(affine):
    objective = FewShot(FewShotConfig(consistency=0.0), affine(VE))
    objective.prepare([_batch()])
    assert objective.direction is None and objective.buffers() == {}
    assert len(list(objective.losses(_batch(), 0))) == 1


@pytest.mark.parametrize("step", [0, 1])
def test_a_batch_of_eight_is_eight_batches(affine, path, step):
    denoiser = affine(path)
    objective = FewShot(FewShotConfig(), denoiser)
    objective.embed = _embed
    objective.prepare([_batch(range(8))])
    denoiser.set_affine("student", 0.2, -0.1)
    whole, _ = _run(objective, _batch(range(8), step), step)
    parts = sum(_run(objective, _batch((i,), step), step)[0] for i in range(8)) / 8
    assert torch.allclose(whole, parts, rtol=1e-4, atol=1e-6)


def test_checkpointing_changes_no_gradient(tiny, path):
    denoiser = tiny(path)
    objective = FewShot(FewShotConfig(), denoiser)
    batch = three_latents()
    # The embedding is the frozen network itself: two adapters' states in one loss.
    objective.prepare([batch])
    same_with_checkpoints(objective, batch)


def test_preparing_is_asked_for(affine):
    with pytest.raises(ValueError, match="prepare"):
        next(iter(FewShot(FewShotConfig(), affine(VE)).losses(_batch(), 0)))


def test_preview_is_the_sources_data_before_training(affine, path):
    denoiser = affine(path, mean=0.5, std=0.7)
    objective = FewShot(FewShotConfig(steps=200), denoiser)
    with denoiser.adapter("student"):
        x = objective.sample(torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)), None, None)
    assert x.mean().item() == pytest.approx(0.5, abs=0.06) and x.std().item() == pytest.approx(0.7, abs=0.03)


def test_bad_settings_are_named():
    for field, value in {"phase": 10.0, "consistency": -1.0, "source_steps": 0, "cfg": 0.0, "steps": 0}.items():
        with pytest.raises(ValueError, match=field):
            FewShotConfig(**{field: value})
