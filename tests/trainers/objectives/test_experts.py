"""One of two networks that share the levels: draws stay inside exactly, and are those of the whole, given the range."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from retort.sampling.path import FLOW, VE
from retort.sampling.schedule import FlowSchedule, FluxSchedule
from retort.trainers.objectives.dpo import DPO, DPOConfig
from retort.trainers.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from retort.trainers.objectives.parts.contract import Draws

BOUNDARIES = (0.875, 0.9)
COUNT = 4000


@pytest.fixture
def drawn(affine):
    """drawn(schedule, **config) -> levels (COUNT,)."""

    def draw(schedule=None, kind=FlowMatching, settings=FlowMatchingConfig, **config):
        denoiser = affine(FLOW)
        if schedule is not None:
            denoiser.schedule = schedule
        return kind(settings(**config), denoiser).sigma(Draws(3, 0, tuple(range(COUNT))))

    return draw


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("levels", ["uniform", "logit_normal", "core"])
@pytest.mark.parametrize("expert", ["high noise", "low noise"])
@pytest.mark.parametrize("schedule", [FlowSchedule(5.0), FluxSchedule(1.15)], ids=["shift", "flux"])
def test_draws_are_the_wholes_in_the_experts_range(drawn, boundary, levels, expert, schedule):
    whole = drawn(schedule, levels=levels, mean=0.3, std=1.4)
    found = drawn(schedule, levels=levels, mean=0.3, std=1.4, expert=expert, boundary=boundary)
    assert found.dtype == torch.float32 and ((found > 0) & (found <= 1)).all()
    inside = (lambda s: s.double() >= boundary) if expert == "high noise" else (lambda s: s.double() < boundary)
    assert inside(found).all()
    expected = whole[inside(whole)]
    assert stats.ks_2samp(found.numpy(), expected.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("expert", ["high noise", "low noise"])
def test_even_draws_are_even_in_the_range(drawn, expert):
    """Against the closed form, both ends reached."""
    found = drawn(expert=expert, boundary=0.875)
    low, high = (0.875, 1.0) if expert == "high noise" else (0.0, 0.875)
    assert stats.kstest(((found - low) / (high - low)).numpy(), "uniform").pvalue > 1e-3
    assert float(found.min()) < low + 0.01 * (high - low) and float(found.max()) > high - 0.01 * (high - low)


def test_the_whole_draws_as_ever_and_pairs_draw_as_images_do(drawn):
    assert torch.equal(drawn(expert="whole", boundary=0.5), drawn())
    for expert in ("whole", "high noise", "low noise"):
        pairs = drawn(kind=DPO, settings=DPOConfig, expert=expert)
        assert torch.equal(pairs, drawn(expert=expert))


def test_high_noise_previews_end_at_the_boundary(affine, monkeypatch):
    """No call below the boundary: the picture is what the expert decides there."""
    denoiser, seen = affine(FLOW), []
    predict = denoiser.predict_x0

    def watched(x, sigma, cond):
        seen.append(float(sigma[0]))
        return predict(x, sigma, cond)

    monkeypatch.setattr(denoiser, "predict_x0", watched)
    noise = torch.randn(2, 1, 4, 4)
    FlowMatching(FlowMatchingConfig(expert="high noise", boundary=0.8), denoiser).sample(noise, None, None)
    assert seen and min(seen) >= 0.8
    seen.clear()
    FlowMatching(FlowMatchingConfig(expert="low noise", boundary=0.8), denoiser).sample(noise, None, None)
    assert len(seen) == 20


def test_a_model_that_is_no_flow_has_no_experts(affine):
    with pytest.raises(ValueError, match="no flow: set it to whole"):
        FlowMatching(FlowMatchingConfig(expert="high noise"), affine(VE))
