"""Schedules of no step, of one level and of one step: what core gives, or a sentence about `sigmas`."""

from __future__ import annotations

import pytest
import torch

from retort.hosts import api, compare, methods, reflection
from retort.hosts.headless.guider import Guider
from retort.hosts.headless.samplers import StandardSampler
from retort.hosts.rewards import kinds as rewards
from retort.hosts.search import run as searching
from retort.hosts.search.request import SearchRequest
from retort.nodes.noise_policy import RetortNoisePolicy
from retort.nodes.reflection import RetortReflectionCompare, RetortReflectionSetup
from retort.nodes.search import METHODS, RetortTreeSearch
from retort.sampling.accounts import Budget
from retort.sampling.distilled import Rule
from retort.sampling.dopri5 import Dopri5Config
from retort.sampling.particles import BestOfConfig
from retort.sampling.reflection import ReflectionConfig
from retort.sampling.teleport import Teleport, low_rank
from retort.sampling.transition import Transition

NO_STEPS = r"^sigmas: the schedule has no steps.*raise denoise"
EMPTY, ONE_LEVEL = torch.empty(0), torch.tensor([0.7])


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["flow", "eps"])
def model(request, tiny):
    return tiny(request.param)


@pytest.fixture
def guider(model):
    return Guider(model.model, model.clip.encode("a seven"), model.clip.encode(""), 2.0)


def ours(guider):
    """Every SAMPLER of ours, as the nodes make it by default."""
    statistics = low_rank(random(8, 4, 8, 8, seed=5))
    return {
        "fresh noise": methods.Distilled(Rule("renoise"), "unit"),
        "predicted noise": methods.Distilled(Rule("deterministic"), "noised"),
        "single": methods.Distilled(Rule("single"), "unit"),
        "teleport": methods.Teleported(StandardSampler("euler"), Teleport(statistics)),
        "reflection": methods.Reflected(guider, ReflectionConfig()),
        "dopri5": methods.Dopri5(Dopri5Config()),
        "structure": methods.Structure(random(2, 4, 8, 8, seed=6), 4, 1, "ode", 0.0, 0.6),
        "ancestral": methods.Structure(random(2, 4, 8, 8, seed=6), 4, 0, "ancestral", 0.0, 1.0),
    }


@pytest.mark.parametrize("empty", [True, False])
def test_every_sampler_gives_what_cores_gives(guider, empty):
    latent, noise = random(2, 4, 8, 8, seed=1) * (not empty), random(2, 4, 8, 8, seed=2)
    top = float(guider.model.schedule.sigma_max)
    levels = [[], [0.0], [float(guider.model.schedule.percent_to_sigma(0.5))]]
    levels += [[top]] if guider.model.path.kind == "VE" else []
    for level in levels:
        sigmas = torch.tensor(level)
        want = guider.sample(noise, latent, StandardSampler("euler"), sigmas, None, None, 1)
        if not level or (level == [0.0] and not empty):
            assert torch.allclose(want, latent, atol=1e-5)
        for name, method in ours(guider).items():
            assert torch.equal(guider.sample(noise, latent, method, sigmas, None, None, 1), want), (name, level)


def test_a_flow_that_stays_at_its_top_is_told_so(tiny):
    model = tiny("flow")
    guider = Guider(model.model, model.clip.encode("a seven"))
    latent = random(2, 4, 8, 8, seed=1)
    for name, method in ours(guider).items():
        with pytest.raises(ValueError, match=r"^sigmas end at level 1.*higher denoise"):
            guider.sample(latent, latent, method, torch.ones(1), None, None, 1)
            raise AssertionError(name)


def test_one_step_is_sampled(guider):
    latent, noise = random(2, 4, 8, 8, seed=1), random(2, 4, 8, 8, seed=2)
    for sigmas in (guider.model.schedule.sigma_max.reshape(1), guider.model.schedule.sigmas[500:501]):
        whole = torch.cat([sigmas.float(), torch.zeros(1)])
        for name, method in ours(guider).items():
            if name == "reflection":  # its last step cannot be reflected
                continue
            out = guider.sample(noise, latent, method, whole, None, None, 1)
            assert out.shape == latent.shape and torch.isfinite(out).all(), name


@pytest.fixture(scope="module")
def digits():
    model, clip, vae = api.host.embedded("flow")
    guider = api.host.cfg_guider(model, clip.encode("a seven"), None, 1.0)
    return model, clip, vae, guider, rewards.make(api.host, "sharpness", {})


def latent(batch=2):
    return {"samples": torch.zeros(batch, 16, 8, 8)}


@pytest.mark.parametrize("sigmas", [EMPTY, ONE_LEVEL])
@pytest.mark.parametrize("name", list(METHODS))
def test_no_search_begins(digits, name, sigmas):
    _, _, vae, guider, reward = digits
    how = {"method": name, **{one.id: one.default for one in METHODS[name]()}}
    with pytest.raises(ValueError, match=NO_STEPS):
        RetortTreeSearch.execute(guider, sigmas, latent(), vae, reward, how)


@pytest.mark.parametrize("sigmas", [EMPTY, ONE_LEVEL])
def test_no_policy_is_learnt(digits, sigmas):
    _, _, vae, guider, reward = digits
    with pytest.raises(ValueError, match=NO_STEPS):
        RetortNoisePolicy.execute(guider, sigmas, latent(), vae, reward)


def test_a_search_that_was_saved_with_no_steps_is_refused_alike(digits):
    _, _, vae, guider, reward = digits
    request = SearchRequest(EMPTY, latent(), "", BestOfConfig(), Transition(), 0)
    earlier = searching.Saved(request, (None, None))
    with pytest.raises(ValueError, match=NO_STEPS):
        searching.run(api.host, guider, vae, reward, request, Budget(80), 8, earlier)


@pytest.mark.parametrize("sigmas", [EMPTY, ONE_LEVEL])
def test_a_reflection_says_that_nothing_is_sampled(digits, sigmas):
    model, clip, vae, _, _ = digits
    words = clip.encode("a seven"), clip.encode("")
    for base in ("euler", "heun", "dpmpp_2m"):
        pair = {"pair": "cfg", "weak_cfg": 0.0}
        guider, sampler, text = RetortReflectionSetup.execute(model, *words, pair, base=base, sigmas=sigmas).args
        assert text.startswith("sigmas: the schedule has no steps") and "raise denoise" in text
    with pytest.raises(ValueError, match=NO_STEPS):
        RetortReflectionCompare.execute(guider, sampler, sigmas, latent(), vae)
    one = torch.tensor([1.0, 0.0])
    with pytest.raises(ValueError, match=r"steps of this schedule that can be reflected.*take more steps"):
        reflection.told(api.host, guider, api.host.method_of(sampler), one)


@pytest.mark.parametrize("sigmas", [EMPTY, ONE_LEVEL])
def test_two_models_are_not_compared(digits, sigmas):
    model, clip, vae, _, reward = digits
    how = compare.Sampling(StandardSampler("euler"), sigmas, 1.0, latent())
    with pytest.raises(ValueError, match=NO_STEPS):
        compare.run(api.host, (model, model), clip, vae, reward, ["a seven"], "", how, [1, 2])
