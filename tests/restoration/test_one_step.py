"""One call on a clean latent: InstaRevive's own numbers, and the same of v and flow students, on every path."""

from __future__ import annotations

import math

import pytest
import torch

from retort.restoration.one_step import OneStep, restore, slope
from retort.sampling.path import FLOW, VE, VP, NoisePath
from retort.sampling.schedule import DiscreteSchedule, FlowSchedule, FluxSchedule

DDPM = DiscreteSchedule("sqrt_linear", 1e-4, 0.02)
CASES = {
    "eps": (VE, DDPM), "v": (VE, DiscreteSchedule()), "v in VP": (VP, DiscreteSchedule(zsnr=True)),
    "flow": (FLOW, FlowSchedule(shift=3.0)), "flux": (FLOW, FluxSchedule(1.15)),
    "scaled flow": (NoisePath("FLOW", 2.0), FlowSchedule(shift=1.0)),
}  # fmt: skip


class Wrapped:
    """A network behind the conversions of ComfyUI's model_sampling, and what it was shown."""

    def __init__(self, kind, path, schedule):
        self.kind, self.path, self.schedule = kind, path, schedule
        self.seen, self.told = [], []

    def network(self, x, t):
        self.seen.append(x.clone())
        self.told.append(t.clone())
        return torch.sin(3 * x) + t.view(-1, 1, 1, 1).to(x) / 1000

    def __call__(self, x, sigma, **extra):
        s = sigma.view(-1, 1, 1, 1)
        shown = x / (1 + s**2).sqrt() if self.path.kind == "VE" else x
        out = self.network(shown, self.schedule.timestep(sigma))
        if self.kind in ("eps", "flow", "flux", "scaled flow"):
            return x - out * s
        return shown / (1 + s**2).sqrt() - out * s / (1 + s**2).sqrt()


@pytest.fixture(params=CASES)
def case(request):
    path, schedule = CASES[request.param]
    return request.param, path, schedule


@pytest.mark.parametrize("timestep", [400, 250, 999])
def test_the_network_sees_the_clean_latent_and_the_timestep(case, timestep):
    kind, path, schedule = case
    model = Wrapped(kind, path, schedule)
    z = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    restore(model, z, OneStep(timestep).sigmas(schedule, path), path=path)
    (seen,), (told,) = model.seen, model.told
    torch.testing.assert_close(seen, z, atol=1e-6, rtol=1e-6)
    unit = float(schedule.timestep(torch.tensor(1.0))) if path.kind == "FLOW" else 1000
    torch.testing.assert_close(told.float(), torch.full((3,), timestep / 1000 * unit), atol=1e-4, rtol=1e-6)


def test_instarevives_own_numbers():
    sigmas = OneStep().sigmas(DDPM, VE)
    abar = 1 / (1 + float(sigmas[0].double()) ** 2)
    assert abar == pytest.approx(0.19357, abs=2e-5)
    assert math.sqrt(1 - abar) == pytest.approx(0.898, abs=5e-4) and math.sqrt(abar) == pytest.approx(0.440, abs=5e-4)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    exact = float(torch.cumprod(1 - betas, 0)[400])
    model = Wrapped("eps", VE, DDPM)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    got = restore(model, z, sigmas, path=VE)
    eps = model.network(z, torch.tensor([400, 400]))
    expected = (z - math.sqrt(1 - exact) * eps) / math.sqrt(exact)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


def test_v_and_flow_by_hand():
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    schedule = DiscreteSchedule()
    for path in (VE, VP):
        model = Wrapped("v", path, schedule)
        got = restore(model, z, OneStep(400).sigmas(schedule, path), path=path)
        abar = 1 / (1 + float(schedule.sigmas[400].double()) ** 2)
        v = model.network(z, torch.tensor([400, 400]))
        torch.testing.assert_close(got, math.sqrt(abar) * z - math.sqrt(1 - abar) * v, atol=1e-5, rtol=1e-5)
    flow = FlowSchedule(shift=3.0)
    model = Wrapped("flow", FLOW, flow)
    got = restore(model, z, OneStep(400).sigmas(flow, FLOW), path=FLOW)
    torch.testing.assert_close(got, z - 0.4 * model.network(z, torch.tensor([400.0, 400.0])), atol=1e-6, rtol=1e-6)


def test_eight_at_once_are_eight_times_one(case):
    kind, path, schedule = case
    z = torch.randn(8, 4, 5, 6, generator=torch.Generator().manual_seed(3))
    model, sigmas = Wrapped(kind, path, schedule), OneStep().sigmas(schedule, path)
    singly = [restore(model, z[i : i + 1], sigmas, path=path) for i in range(8)]
    torch.testing.assert_close(restore(model, z, sigmas, path=path), torch.cat(singly))


def test_the_slope():
    z = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(4))
    assert slope(z, z) == pytest.approx(1)
    assert slope(z, 2.5 * z + 3) == pytest.approx(2.5, rel=1e-5)
    other = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(5))
    other -= other.mean((2, 3), keepdim=True)
    centred = z - z.mean((2, 3), keepdim=True)
    other -= centred * (centred * other).sum() / centred.square().sum()
    assert slope(z, z + 7 * other) == pytest.approx(1, abs=1e-4)
    assert slope(torch.zeros(1, 4, 8, 8), z) == 1
    assert slope(torch.ones(1, 4, 1, 1), torch.zeros(1, 4, 1, 1)) == 1


@pytest.mark.parametrize("timestep", [0, 1001, -5])
def test_timesteps_that_there_are_not(timestep):
    with pytest.raises(ValueError, match="timestep"):
        OneStep(timestep)


def test_a_schedule_without_the_timestep():
    with pytest.raises(ValueError, match="one-step restoration"):
        OneStep(900).sigmas(DiscreteSchedule(timesteps=50), VE)
