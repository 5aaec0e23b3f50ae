"""Grids: the timesteps that ComfyUI's schedulers visit on Stable Diffusion's schedule, and the beta quantiles."""

from __future__ import annotations

import pytest
import torch

from retort.sampling.grids import GRIDS, _beta_quantile, simple
from retort.sampling.schedule import DiscreteSchedule, FlowSchedule, FluxSchedule

SD = DiscreteSchedule()
SCHEDULES = [SD, DiscreteSchedule(zsnr=True), FlowSchedule(), FlowSchedule(3.0), FluxSchedule()]


@pytest.mark.parametrize(
    ("grid", "steps", "timesteps"),
    [
        ("simple", 4, [999, 749, 499, 249]),
        ("simple", 8, [999, 874, 749, 624, 499, 374, 249, 124]),
        ("simple", 2, [999, 499]),
        ("normal", 4, [999, 666, 333, 0]),
        ("ddim_uniform", 4, [751, 501, 251, 1]),
        ("karras", 4, [999, 687, 146, 0]),
        ("exponential", 4, [999, 538, 52, 0]),
    ],
)
def test_stable_diffusion_timesteps(grid, steps, timesteps):
    sigmas = GRIDS[grid](SD, steps)
    assert sigmas[-1] == 0
    assert SD.timestep(sigmas[:-1]).tolist() == timesteps


def test_sgm_uniform_lies_between_timesteps():
    sigmas = GRIDS["sgm_uniform"](SD, 4)
    torch.testing.assert_close(sigmas[:-1], SD.sigma(torch.tensor([999.0, 749.25, 499.5, 249.75])), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: repr(s)[:40])
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_grids_descend_to_zero(name, schedule, steps):
    sigmas = GRIDS[name](schedule, steps)
    assert sigmas.dtype == torch.float32 and sigmas.ndim == 1
    assert sigmas[-1] == 0
    assert bool((sigmas[1:] < sigmas[:-1]).all())
    if name not in ("ddim_uniform", "beta"):
        assert len(sigmas) == steps + 1


def test_simple_on_flow_is_the_shifted_quarters():
    torch.testing.assert_close(simple(FlowSchedule(3.0), 4), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))


def test_beta_quantiles_agree_with_scipy():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: nothing to compare the quantiles with")
    for steps in (1, 2, 3, 4, 20, 50, 111):
        for i in range(steps):
            p = 1 - i / steps
            assert _beta_quantile(p, 0.6, 0.6) == pytest.approx(float(stats.beta.ppf(p, 0.6, 0.6)), rel=1e-9)
    assert _beta_quantile(0.3, 2.0, 5.0) == pytest.approx(float(stats.beta.ppf(0.3, 2.0, 5.0)), rel=1e-9)


@pytest.mark.parametrize("name", GRIDS)
def test_zero_steps_are_refused(name):
    with pytest.raises(ValueError, match=f"grid '{name}': steps must be at least 1, got 0"):
        GRIDS[name](SD, 0)
