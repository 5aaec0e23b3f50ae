"""One of two networks that share the levels: draws stay inside exactly, and are those of the whole, given the range."""

from __future__ import annotations

import contextlib

import pytest
import torch
from scipy import stats

from retort.sampling.grids import simple
from retort.sampling.path import FLOW, VE
from retort.sampling.schedule import FlowSchedule, FluxSchedule
from retort.trainers.objectives.dpo import DPO, DPOConfig
from retort.trainers.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from retort.trainers.objectives.parts.contract import Draws, Tools

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


class Fixed:
    """The other expert: x0 = gain x + cond, and the levels that it was asked at."""

    def __init__(self, path, gain):
        self.path, self.gain, self.seen = path, gain, []

    def predict_x0(self, x, sigma, cond):
        self.seen.append(float(sigma[0]))
        return self.gain * x + cond


@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("kind", ["images", "pairs"])
@pytest.mark.parametrize("expert", ["high noise", "low noise"])
def test_both_experts_sample_a_preview_where_both_are_there(affine, expert, kind, cfg):
    """Against Euler's steps by hand, each network at its own levels, the other one let go after its leg."""
    denoiser, entered = affine(FLOW), []
    other = Fixed(FLOW, 0.25)

    def own(x, sigma, cond):
        return 0.6 * x - cond

    denoiser.predict_x0 = own

    @contextlib.contextmanager
    def lent():
        entered.append("in")
        yield other
        entered.append("out")

    made, settings = (FlowMatching, FlowMatchingConfig) if kind == "images" else (DPO, DPOConfig)
    config = settings(expert=expert, boundary=0.8, steps=7, cfg=cfg)
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = made(config, denoiser, Tools(other=lent)).sample(noise, 0.3, -0.2)
    assert entered == ["in", "out"]

    sigmas, x = simple(denoiser.schedule, 7), noise.clone()
    for level, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        high = float(level) >= 0.8
        ask = own if high == (expert == "high noise") else Fixed(FLOW, 0.25).predict_x0
        x0, without = (ask(x, level.view(1), told) for told in (0.3, -0.2))
        x0 = x0 if cfg == 1 else without + cfg * (x0 - without)
        x = x0 + (after / level) * (x - x0)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-6)
    side = [float(s) for s in sigmas[:-1] if (float(s) < 0.8) == (expert == "high noise")]
    assert sorted(set(other.seen), reverse=True) == pytest.approx(side)


def test_an_expert_with_all_of_a_previews_levels_makes_it_alone(affine):
    denoiser, noise = affine(FLOW), torch.randn(2, 1, 4, 4)

    def never():
        raise AssertionError("the other expert has no level of this grid")

    config = FlowMatchingConfig(expert="high noise", boundary=0.001, steps=4)
    whole = FlowMatching(FlowMatchingConfig(steps=4), denoiser).sample(noise, None, None)
    assert torch.equal(FlowMatching(config, denoiser, Tools(other=never)).sample(noise, None, None), whole)
