"""Levels by their place on every kind of schedule, and what a network's output is in x0, by independent formulas."""

from __future__ import annotations

import math

import pytest
import torch

from retort.sampling.levels import Levels, Parametrisation
from retort.sampling.path import FLOW, RECTIFIED, VE, VP, NoisePath, time_of
from retort.sampling.schedule import DiscreteSchedule, FlowSchedule, FluxSchedule

SD = DiscreteSchedule()


class Spaced:
    """Every 20th level of a table, told by its timestep among all, as ComfyUI's sampling for LCM has it."""

    sigmas = SD.sigmas[19::20]

    def timestep(self, sigma):
        return (sigma.log() - self.sigmas.log()[:, None]).abs().argmin(dim=0).view(sigma.shape) * 20 + 19

    def sigma(self, timestep):
        return self.sigmas[((timestep - 19) / 20).clamp(0, 49).round().long()]


def shares(count=4000):
    return (torch.arange(count) + 1) / count


def test_tables_and_continuous_schedules_are_told_apart(continuous):
    schedule, path, _ = continuous
    assert not Levels(schedule, path).tabulated
    assert Levels(SD, VE).tabulated and Levels(DiscreteSchedule(zsnr=True), VP).tabulated
    assert Levels(Spaced(), VE).tabulated and Levels(DiscreteSchedule(timesteps=50), VE).tabulated
    assert not any(Levels(flow, FLOW).tabulated for flow in (FlowSchedule(3.0), FluxSchedule()))


def test_continuous_levels_are_even_in_the_angle_between_signal_and_noise(continuous):
    schedule, path, _ = continuous
    levels, low, high = Levels(schedule, path), float(schedule.sigmas[0]), float(schedule.sigmas[-1])
    times = torch.linspace(0, 1000, 101)
    sigma = levels.level(times)
    assert float(sigma[0]) == pytest.approx(low) and float(sigma[-1]) == pytest.approx(high, rel=1e-4)
    assert (sigma[1:] > sigma[:-1]).all()
    torch.testing.assert_close(levels.time(sigma), times, atol=2e-3, rtol=1e-4)
    angle = (sigma.double() / path.sigma_data).atan()
    torch.testing.assert_close(angle.diff(), (angle[-1] - angle[0]).expand(100) / 100, atol=1e-6, rtol=1e-4)
    # Half of the draws are noisier than the data, whatever the range and the data's size.
    drawn = levels.drawn(torch.rand(20_000, generator=torch.Generator().manual_seed(0)))
    middle = path.sigma_data * math.tan((math.atan(low / path.sigma_data) + math.atan(high / path.sigma_data)) / 2)
    assert float((drawn > middle).float().mean()) == pytest.approx(0.5, abs=0.02)
    for found in (levels.uniform(shares()), levels.sampled(shares()), levels.trained(1000 * shares()), drawn):
        assert torch.isfinite(found).all() and low <= float(found.min()) and float(found.max()) <= high


def test_a_continuous_place_ends_the_draws_at_its_level(continuous):
    schedule, path, _ = continuous
    levels, high = Levels(schedule, path), path.sigma_data * 1.7
    drawn = levels.drawn(shares() - 1 / 4000, 0.0, levels.place(high))
    assert float(drawn.max()) == pytest.approx(high, rel=1e-2) and float(drawn.max()) <= high * (1 + 1e-5)
    assert levels.place(1e9) == 1.0 and levels.place(1e-9) == 0.0


def test_core_s_percentages_are_what_they_are_in_sampling(continuous):
    schedule, path, _ = continuous
    expected = [schedule.percent_to_sigma(1 - share) for share in (0.25, 0.5, 0.9)]
    found = Levels(schedule, path).sampled(torch.tensor([0.25, 0.5, 0.9]))
    assert found.tolist() == pytest.approx([float(sigma) for sigma in expected], rel=1e-5)


def test_one_step_begins_where_there_is_as_much_noise_as_on_a_table(continuous):
    schedule, path, _ = continuous
    assert Levels(schedule, path).one_step() == pytest.approx(1.2 * path.sigma_data)
    assert Levels(SD, VE).one_step() == float(SD.sigmas[399]) == pytest.approx(1.2, abs=0.05)


def test_levels_of_a_rectified_flow_are_even_in_its_time(rectified):
    schedule, path, _ = rectified
    levels, low, high = Levels(schedule, path), float(schedule.sigmas[0]), float(schedule.sigmas[-1])
    assert levels.listed and not levels.tabulated
    times = torch.tensor([0.0, 2.5, 250.0, 500.0, 980.0, 1000.0])
    expected = [low, 2.5 / 997.5, 1 / 3, 1.0, 49.0, high]
    assert levels.level(times).tolist() == pytest.approx(expected, rel=1e-5)
    assert levels.time(torch.tensor(expected)).tolist()[1:5] == pytest.approx(times.tolist()[1:5], rel=1e-5)
    ends = low / (1 + low), high / (1 + high)
    even = time_of(levels.uniform(shares()))
    torch.testing.assert_close(even.diff(), torch.full((3999,), (ends[1] - ends[0]) / 4000), rtol=2e-3, atol=0)
    assert float(even[-1]) == pytest.approx(ends[1], rel=1e-5)
    # As of any flow: between two times, behind a shift, and no further than the schedule goes.
    drawn = levels.drawn(torch.tensor([0.0, 0.5, 0.999]), 0.02, 0.98, shift=3.0)
    t = torch.tensor([0.02, 0.5, 0.02 + 0.96 * 0.999])
    torch.testing.assert_close(drawn, (3 * t / (1 - t)).clamp(max=high), rtol=1e-4, atol=0)
    for shift in (1.0, 3.0):
        end = levels.drawn(torch.tensor([1.0]), 0.02, levels.place(5.0, shift), shift)
        assert float(end) == pytest.approx(5.0, rel=1e-5)
    for found in (levels.trained(1000 * shares()), levels.sampled(shares()), levels.drawn(shares())):
        assert low <= float(found.min()) and float(found.max()) <= high and (found.diff() >= 0).all()
    assert levels.one_step() == high


def test_every_entry_of_a_table_is_drawn_as_often():
    for schedule in (SD, Spaced(), DiscreteSchedule("sqrt_linear", 1e-4, 0.02, timesteps=50)):
        levels = Levels(schedule, VE)
        found = levels.uniform(shares())
        entries = (found[:, None].log() - schedule.sigmas.log()).abs().argmin(1)
        torch.testing.assert_close(found, schedule.sigmas[entries], rtol=1e-5, atol=0)
        counts = torch.bincount(entries, minlength=len(schedule.sigmas))
        assert counts.float().mean() == 4000 / len(schedule.sigmas) and int(counts.max() - counts.min()) <= 2


def test_times_of_a_table_are_the_network_s():
    levels = Levels(SD, VE)
    assert levels.time(SD.sigmas[[0, 399, 999]]).tolist() == [0.0, 399.0, 999.0]
    assert torch.equal(levels.trained(torch.tensor([399.7])), SD.sigma(torch.tensor([399.0])))
    short = Levels(DiscreteSchedule(timesteps=50), VE)
    assert short.time(short.schedule.sigmas[[0, 49]]).tolist() == [0.0, 980.0]
    assert torch.equal(short.trained(torch.tensor([985.0])), short.schedule.sigma(torch.tensor([49.0])))


@pytest.mark.parametrize("levels", [[0.0, 1.0], [1.0, 0.5], [1.0, math.inf], [1.0, math.nan]])
def test_a_schedule_that_no_network_can_be_trained_on_is_named(levels):
    class Broken:
        sigmas = torch.tensor(levels)

    with pytest.raises(ValueError, match="Broken: the levels of this noise schedule do not rise from above zero"):
        Levels(Broken(), VE)


KINDS = [
    ("eps", VE), ("v", VE), ("edm", NoisePath("VE", sigma_data=0.5)), ("v", NoisePath("VE", sigma_data=0.5)),
    ("eps", NoisePath("VE", sigma_data=0.5)), ("x0", VE), ("eps", VP), ("v", VP), ("flow", FLOW),
    ("flow", NoisePath("FLOW", 2.0)), ("x0", FLOW), ("flow", RECTIFIED), ("x0", RECTIFIED),
]  # fmt: skip


NAMES = [f"{p}-{q.kind}-{q.sigma_data}-{q.rectified}" for p, q in KINDS]


@pytest.mark.parametrize(("prediction", "path"), KINDS, ids=NAMES)
def test_the_target_of_a_network_gives_the_clean_latent(prediction, path):
    """x0 from what the network should put out at this x, by the definition of eps, v, EDM's F and a flow's velocity."""
    generator = torch.Generator().manual_seed(0)
    x0, n = (torch.randn(3, 2, 64, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    x0 = x0 * path.sigma_data
    sigma = torch.tensor([0.05, 0.6, 0.95 if path.kind == "FLOW" else 9.0], dtype=torch.float64)
    s = sigma.view(-1, 1, 1, 1)
    x, kind = path.add_noise(x0, sigma, n), Parametrisation(prediction, path)
    # The angle whose cosine is the signal's share of the network's input.
    angle = (s / path.sigma_data).atan()
    v = angle.cos() * n - angle.sin() * x0 / path.sigma_data
    target = {"eps": n, "v": v, "edm": -v, "flow": path.noise_scale * n - x0, "x0": x0}[prediction]
    torch.testing.assert_close(kind.x0(target, x, sigma), x0, rtol=1e-10, atol=1e-10)
    shown = kind.shown(x, sigma)
    if path.rectified:
        torch.testing.assert_close(shown, FLOW.add_noise(x0, time_of(sigma), n))
    elif path.kind != "FLOW":
        torch.testing.assert_close(shown.std((1, 2, 3)), torch.ones(3).double(), rtol=0.05, atol=0)
        torch.testing.assert_close(kind.shown(path.unit_start(sigma, n), sigma), n)
    if prediction in ("v", "edm"):
        torch.testing.assert_close(target.std((1, 2, 3)), torch.ones(3).double(), rtol=0.05, atol=0)
    # Affine in both: a difference of one is the slope.
    output, latent = kind.x0(target + 1, x, sigma), kind.x0(target, x + 1, sigma)
    for there, slope in ((output, kind.scale(sigma)), (latent, kind.through(sigma))):
        found = (there - kind.x0(target, x, sigma)).abs()[:, 0, 0, 0]
        torch.testing.assert_close(found, slope, rtol=1e-9, atol=1e-9)
