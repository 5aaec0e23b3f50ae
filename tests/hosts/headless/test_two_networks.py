"""Two networks in one run, labels of another timestep and noise of another scale on the headless host."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from retort.hosts.headless.guider import Guider
from retort.hosts.headless.host import host
from retort.hosts.headless.model import LatentFormat, Model, NetworkSource
from retort.hosts.headless.samplers import StandardSampler
from retort.hosts.methods import Distilled, Dopri5, Dopri5Config, Reflected, ReflectionConfig
from retort.sampling.distilled import Rule
from retort.sampling.path import FLOW, VE, VP
from retort.sampling.schedule import DiscreteSchedule, FlowSchedule

PROMPT = [[torch.zeros(1, 4, 8), {}]]
SHAPE = (2, 4, 8, 8)
SD, COG = DiscreteSchedule(), DiscreteSchedule(zsnr=True)
KINDS = {
    "flow": (FLOW, "flow", FlowSchedule(3.0), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0])),
    "eps": (VE, "eps", SD, torch.cat([SD.sigmas[[999, 749, 499, 249]], torch.zeros(1)])),
    "v": (VP, "v", COG, torch.cat([COG.sigmas[[999, 749, 499, 249]], torch.zeros(1)])),
}


class Network:
    """Predicts a part of its input and keeps what came in."""

    device = torch.device("cpu")
    repeats_context = False

    def __init__(self, part=0.1):
        self.part, self.inputs, self.timesteps = part, [], []

    def conditions(self, tokens, extra, shape):
        return {"context": tokens}

    def __call__(self, x, timestep, **conditions):
        self.inputs.append(x)
        self.timesteps.append(float(timestep[0]))
        return torch.tanh(x) * self.part


def made(kind, network, scale=2.0, shift=0.1):
    path, prediction, schedule, _ = KINDS[kind]
    source = NetworkSource(lambda loras: network)
    return Model(source, schedule, path, prediction, LatentFormat(4, scale=scale, shift=shift))


def sampled(guider, sampler, sigmas, latent=None, mask=None):
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    return guider.sample(noise, torch.zeros(SHAPE) if latent is None else latent, sampler, sigmas, mask, seed=3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["renoise", "deterministic", "ancestral", "tcd"])
def test_each_network_is_asked_at_its_own_levels_and_goes_on_as_one_would(kind, mode):
    sigmas = KINDS[kind][3]
    boundary, rule = float(sigmas[1] + sigmas[2]) / 2, Rule(mode, 0.4)
    first, second, alone = Network(), Network(), Network()
    other = Guider(made(kind, second), PROMPT)
    found = sampled(Guider(made(kind, first), PROMPT), Distilled(rule, "unit", None, other, boundary), sigmas)
    expected = sampled(Guider(made(kind, alone), PROMPT), Distilled(rule, "unit"), sigmas)
    assert (len(first.timesteps), len(second.timesteps)) == (2, 2)
    assert first.timesteps + second.timesteps == alone.timesteps
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)
    another = Guider(made(kind, Network(0.5)), PROMPT)
    changed = sampled(Guider(made(kind, first), PROMPT), Distilled(rule, "unit", None, another, boundary), sigmas)
    assert not torch.allclose(changed, found, atol=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_area_stays(kind):
    sigmas, picture = KINDS[kind][3], torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    guider = Guider(made(kind, Network()), PROMPT)
    boundary = float(sigmas[1] + sigmas[2]) / 2
    twice = sampled(guider, Distilled(Rule(), "unit", None, guider, boundary), sigmas, picture, mask)
    once = sampled(guider, Distilled(Rule(), "unit"), sigmas, picture, mask)
    torch.testing.assert_close(twice, once, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(twice[..., 4:], picture[..., 4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("second", [False, True], ids=["one network", "two"])
def test_a_network_is_told_a_part_of_its_timestep_in_this_run_alone(kind, second):
    sigmas, network = KINDS[kind][3], Network()
    guider = Guider(made(kind, network), PROMPT)
    plain = sampled(guider, Distilled(Rule(), "unit"), sigmas)
    more = (None, guider, float(sigmas[2])) if second else ()
    told = sampled(guider, Distilled(Rule(label_scale=0.25), "unit", *more), sigmas)
    again = sampled(guider, Distilled(Rule(), "unit"), sigmas)
    assert network.timesteps[4:8] == [math.floor(0.25 * t) for t in network.timesteps[:4]]
    assert network.timesteps[:4] == network.timesteps[8:] == [999, 749, 499, 249]
    assert torch.equal(plain, again) and not torch.allclose(plain, told)
    torch.testing.assert_close(network.inputs[4], network.inputs[0])


def test_noise_of_another_scale_is_the_models_and_the_samplers():
    network = Network()
    model = host.with_noise_scale(made("flow", network), 7.5)
    assert model.path.noise_scale == model.schedule.noise_scale == 7.5
    sigmas = KINDS["flow"][3]
    expected = sampled(Guider(model, PROMPT), Distilled(Rule(), "unit"), sigmas)
    found = sampled(Guider(made("flow", network), PROMPT), Distilled(Rule(noise_scale=7.5), "unit"), sigmas)
    assert torch.equal(found, expected) and 6 < float(network.inputs[0].std()) < 9
    with pytest.raises(ValueError, match="noise_scale 7.5 cannot be set"):
        host.with_noise_scale(made("eps", network), 7.5)
    with pytest.raises(ValueError, match="audio_shift 3 cannot be set"):
        host.with_shift(made("flow", network), 12.0, 3.0)


def test_a_guider_of_a_first_network_refuses_whoever_does_not_hand_on():
    sigmas, second = KINDS["flow"][3], Guider(made("flow", Network()), PROMPT)
    first = host.cfg_guider(made("flow", Network()), PROMPT, None, 1.0, lowest=0.8)
    assert torch.isfinite(sampled(first, Distilled(Rule(), "unit", None, second, 0.8), sigmas)).all()
    assert torch.isfinite(sampled(first, StandardSampler("euler"), sigmas[:3])).all()
    reflected = Reflected(second, ReflectionConfig())
    for sampler in (StandardSampler("euler"), Distilled(Rule(), "unit"), Dopri5(Dopri5Config()), reflected):
        with pytest.raises(ValueError, match="sigmas go below 0.8, where the guider's model ends"):
            sampled(host.at_cfg(first, 1.0), sampler, sigmas)
    with pytest.raises(ValueError, match="sigmas go below 0.8"):
        sampled(second, Reflected(first, ReflectionConfig()), sigmas)


def test_a_second_network_of_another_kind_is_refused():
    first = Guider(made("flow", Network()), PROMPT)
    other = replace(made("flow", Network()), latent=LatentFormat(16))
    with pytest.raises(ValueError, match="the second guider's model has latents of another format"):
        sampled(first, Distilled(Rule(), "unit", None, Guider(other, PROMPT), 0.8), KINDS["flow"][3])
