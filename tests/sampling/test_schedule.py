"""Schedules: published levels, and each timestep and level going into the other and back."""

from __future__ import annotations

import math

import pytest
import torch

from retort.sampling.schedule import DiscreteSchedule, FlowSchedule, FluxSchedule

SD = DiscreteSchedule()


@pytest.mark.parametrize(
    ("t", "abar", "sigma"),
    [
        (999, 0.004660, 14.6146),
        (749, 0.056623, 4.0817),
        (499, 0.277670, 1.6129),
        (249, 0.675432, 0.6932),
        (399, 0.426086, 1.16058),
    ],
)
def test_stable_diffusion_levels(t, abar, sigma):
    assert float(1 / (1 + SD.sigmas[t].double() ** 2)) == pytest.approx(abar, abs=6e-7)
    assert float(SD.sigmas[t]) == pytest.approx(sigma, rel=2e-5)


def test_pixart_level():
    pixart = DiscreteSchedule("sqrt_linear", 1e-4, 0.02)
    assert float(1 / (1 + pixart.sigmas[400].double() ** 2)) == pytest.approx(0.19357, abs=5e-6)


@pytest.mark.parametrize("schedule", [SD, DiscreteSchedule(zsnr=True), DiscreteSchedule("sqrt_linear", 1e-4, 0.02)])
def test_every_table_level_has_its_own_timestep(schedule):
    everyone = torch.arange(1000)
    assert torch.equal(schedule.timestep(schedule.sigmas), everyone)
    assert torch.equal(schedule.timestep(schedule.sigma(everyone)), everyone)
    torch.testing.assert_close(schedule.sigma(everyone), schedule.sigmas, rtol=1e-5, atol=0)


def test_fractional_timesteps_interpolate_log_sigma_and_clamp():
    between = SD.sigma(torch.tensor(10.5))
    assert float(between) == pytest.approx(math.sqrt(float(SD.sigmas[10]) * float(SD.sigmas[11])), rel=1e-5)
    assert float(SD.sigma(torch.tensor(2000.0))) == pytest.approx(float(SD.sigma_max), rel=1e-6)
    assert SD.timestep(torch.ones(3)).shape == (3,)
    assert SD.timestep(torch.tensor(1.0)).shape == ()


def test_zero_terminal_snr_keeps_the_first_level_and_ends_in_noise():
    z = DiscreteSchedule(zsnr=True)
    assert float(z.sigma_min) == pytest.approx(float(SD.sigma_min), rel=1e-4)
    assert float(z.sigma_max) == pytest.approx(math.sqrt(1 / 4.8973451890853435e-08 - 1), rel=1e-6)


def test_percent():
    for schedule, top in ((SD, 999999999.9), (FlowSchedule(3.0), 1.0), (FluxSchedule(), 1.0)):
        assert schedule.percent_to_sigma(0.0) == top
        assert schedule.percent_to_sigma(1.0) == 0.0
    assert SD.percent_to_sigma(0.5) == pytest.approx(float(SD.sigma(torch.tensor(499.5))), rel=1e-6)
    assert FlowSchedule(3.0).percent_to_sigma(0.5) == pytest.approx(0.75)
    assert FluxSchedule(0.0).percent_to_sigma(0.25) == pytest.approx(0.75)


def test_flow_shift():
    flow = FlowSchedule(3.0)
    assert flow.sigmas.shape == (1000,)
    assert float(flow.sigma_max) == 1.0
    assert float(flow.sigmas[499]) == pytest.approx(0.75)
    assert float(flow.timestep(torch.tensor(0.75))) == 750.0
    assert torch.equal(FlowSchedule().sigmas, torch.arange(1, 1001) / 1000 * 1000 / 1000)
    # e^mu is Flux's shift: the two forms are one.
    torch.testing.assert_close(
        FluxSchedule(math.log(3.0)).sigmas[9::10], flow.sigmas, rtol=1e-5, atol=0, check_dtype=False
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiscreteSchedule("cosine"), "beta_schedule 'cosine' is not known"),
        (lambda: DiscreteSchedule(timesteps=1), "timesteps must be at least 2"),
        (lambda: DiscreteSchedule(linear_start=0.5, linear_end=0.1), "0 < linear_start <= linear_end < 1"),
        (lambda: FlowSchedule(shift=0.0), "shift must be a positive number, got 0.0"),
        (lambda: FlowSchedule(multiplier=-1), "multiplier must be a positive number"),
        (lambda: FlowSchedule(noise_scale=math.nan), "noise_scale must be a positive number"),
        (lambda: FluxSchedule(math.inf), "shift must be a finite number"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
