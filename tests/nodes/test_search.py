"""The search nodes on the headless host, with the embedded model and its judge."""

from __future__ import annotations

import pytest
import torch

from retort.graphs.core.sampling import grid
from retort.hosts import api
from retort.hosts.headless.noise import RandomNoise
from retort.hosts.headless.samplers import StandardSampler
from retort.hosts.rewards import kinds as rewards
from retort.hosts.search.report import draw, spelt, thumbnail
from retort.nodes.search import METHODS, RetortResumeSearch, RetortTreeSearch, budget_of, config_of

STEPS, PROMPT = 5, "a blue seven on yellow paper"
CALLS = 12 * STEPS
DEFAULTS = {name: {i.id: i.default for i in inputs()} for name, inputs in METHODS.items()}


def method(name, **changes):
    return {"method": name, **DEFAULTS[name], **changes}


@pytest.fixture(scope="module")
def parts():
    """parts(variant, cfg) -> guider, sigmas, vae, reward."""
    made = {}

    def make(variant="flow", cfg=1.0):
        if variant not in made:
            made[variant] = api.host.embedded(variant)
        model, clip, vae = made[variant]
        negative = clip.encode("") if cfg != 1 else None
        guider = api.host.cfg_guider(model, clip.encode(PROMPT), negative, cfg)
        return guider, grid(model, "simple", STEPS), vae, rewards.make(api.host, "embedded_judge", {"boldness": 1.0})

    return make


def empty(batch=1):
    return {"samples": torch.zeros(batch, 16, 8, 8)}


def found(parts, name="dts_star", latent=None, **given):
    guider, sigmas, vae, reward = parts
    given = {"calls": CALLS, "prompt": PROMPT, "seed": 3, **given}
    how = given.pop("method", None) or method(name)
    return RetortTreeSearch.execute(guider, sigmas, latent or empty(), vae, reward, how, **given).args


def plain(guider, sigmas, sampler="euler_ancestral", latent=None, mask=None):
    latent = empty()["samples"] if latent is None else latent
    noise = RandomNoise(3).generate_noise({"samples": latent})
    return guider.sample(noise, latent, StandardSampler(sampler), sigmas, mask, None, 3)


def score(parts, samples):
    return parts[3](parts[2].decode(samples), PROMPT)


@pytest.mark.parametrize("name", list(METHODS))
def test_each_candidate_is_decoded_once_and_the_report_shows_the_best(parts, name, monkeypatch):
    """Of a search that goes on, besides what it scores itself, those of the best that it was given."""
    have, decoded = parts("flow"), []
    decode = type(api.host).decode

    def counted(self, vae, samples):
        decoded.append(len(samples))
        return decode(self, vae, samples)

    monkeypatch.setattr(type(api.host), "decode", counted)
    _, top, saved, report, text = found(have, name)
    state = saved.states[0]
    assert sum(decoded) == state.ledger.rewards >= 4
    images = decode(api.host, have[2], top["samples"])
    title = f"best {spelt(state.best.reward)}, {state.ledger.calls} calls, {state.ledger.rewards} rewards"
    shown = draw(state, [thumbnail(image) for image in images], title, 1)
    torch.testing.assert_close(report, shown, atol=1.5 / 255, rtol=0)
    decoded.clear()
    again = RetortResumeSearch.execute(saved, *have[:1], *have[2:], calls=CALLS).args
    after = again[2].states[0]
    assert 0 < sum(decoded) <= after.ledger.rewards - state.ledger.rewards + len(top["samples"])


@pytest.mark.parametrize("variant", ["flow", "eps"])
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_beats_the_plain_sample(parts, variant, name):
    have = parts(variant)
    best, top, saved, report, text = found(have, name)
    rewards = score(have, top["samples"])
    assert torch.equal(best["samples"], top["samples"][:1])
    assert len(top["samples"]) == min(4, saved.states[0].drawn) >= 3
    recorded = [c.reward for c in saved.states[0].best.found]
    assert recorded == sorted(recorded, reverse=True)
    assert torch.allclose(rewards, torch.tensor(recorded), atol=1e-4)
    if name not in ("svdd", "fk"):  # their first sample is not the plain one
        assert rewards[0] >= score(have, plain(*have[:2]))[0] - 1e-4
    assert saved.states[0].ledger.calls <= CALLS and saved.states[0].ledger.rewards >= 4
    assert report.shape[0] == 1 and report.shape[-1] == 3 and 0 <= report.min() < report.max() <= 1
    assert f"{saved.states[0].ledger.calls} network calls" in text


@pytest.mark.parametrize("variant", ["flow", "eps"])
@pytest.mark.parametrize(("transition", "sampler"), [("auto", "euler_ancestral"), ("ode", "euler")])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_one_candidate_is_the_plain_sample(parts, variant, transition, sampler, cfg):
    have = parts(variant, cfg)
    calls = STEPS * (1 if cfg == 1 else 2)
    best, _, saved, *_ = found(have, transition=transition, calls=calls)
    assert saved.states[0].drawn >= 1 and saved.states[0].ledger.calls == calls
    assert torch.allclose(best["samples"], plain(*have[:2], sampler), atol=1e-6)
    given = found(have, transition=transition, calls=calls, seed=99, noise=RandomNoise(3))[0]
    assert torch.equal(given["samples"], best["samples"])


def test_the_batch_changes_nothing(parts):
    have = parts("eps", 3.0)
    one, eight = (found(have, batch_size=b)[1]["samples"] for b in (1, 8))
    assert torch.allclose(one, eight, atol=1e-3)


@pytest.mark.parametrize("name", ["dts_star", "dts", "best_of_n"])
def test_resuming_is_going_on(parts, name):
    guider, sigmas, vae, reward = have = parts("flow")
    whole = found(have, name, calls=2 * CALLS)
    half = found(have, name)
    state = half[2].states[0]
    spent, drawn = state.ledger.calls, state.drawn
    for _ in range(2):  # the saved search is not used up
        more = RetortResumeSearch.execute(half[2], guider, vae, reward, calls=CALLS).args
        assert more[2].states[0].ledger.calls > spent and more[2].states[0].drawn > drawn
        assert (state.ledger.calls, state.drawn) == (spent, drawn)
        # A budget that ends within a round leaves some calls over.
        assert abs(more[2].states[0].ledger.calls - whole[2].states[0].ledger.calls) <= 2 * STEPS
        assert score(have, more[0]["samples"])[0] >= score(have, half[0]["samples"])[0] - 1e-5
    if name == "best_of_n":
        assert torch.allclose(more[1]["samples"], whole[1]["samples"], atol=1e-4)
    with pytest.raises(ValueError, match="identity"):
        other = api.host.cfg_guider(guider.model, [[t + 1, e] for t, e in guider.positive], None, 1.0)
        RetortResumeSearch.execute(half[2], other, vae, reward, calls=CALLS)


def test_items_of_a_batch_are_searched_on_their_own(parts):
    have = parts()
    best, top, saved, report, text = found(have, "best_of_n", empty(2), calls=4 * STEPS, keep=2)
    assert len(best["samples"]) == 2 and len(top["samples"]) == 4 and len(saved.states) == len(report) == 2
    assert "item 2 of 2" in text and not torch.equal(best["samples"][0], best["samples"][1])
    alone = found(have, "best_of_n", calls=4 * STEPS, keep=2)
    assert torch.allclose(alone[1]["samples"], top["samples"][:2], atol=1e-5)


def test_a_picture_and_a_mask_hold_in_every_rollout(parts):
    guider, sigmas, vae, reward = parts()
    picture = plain(guider, sigmas)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    latent = {"samples": picture, "noise_mask": mask}
    have = guider, sigmas[1:], vae, reward
    best, top, *_ = found(have, latent=latent)
    assert torch.allclose(top["samples"][..., :3], picture.expand(4, -1, -1, -1)[..., :3], atol=1e-4)
    assert (top["samples"][..., 5:] - picture[..., 5:]).abs().amax((1, 2, 3)).min() > 0.1
    one = found(have, latent=latent, calls=STEPS - 1)[0]["samples"]
    assert torch.allclose(one, plain(guider, sigmas[1:], latent=picture, mask=mask), atol=1e-5)


class Odd:
    """A reward that goes wrong on its second batch."""

    name, differentiable, range = "odd", False, (0.0, 1.0)

    def __init__(self, then):
        self.then, self.seen = then, 0

    def __call__(self, images, prompts):
        self.seen += 1
        answer = images.mean((1, 2, 3))
        return answer if self.seen < 2 else self.then(answer)


def stop(answer):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("then", "said"),
    [
        (lambda r: r * float("nan"), "reward odd is nan"),
        (lambda r: r + float("inf"), "reward odd is inf"),
        (lambda r: r[:, None], "one number each"),
        (lambda r: 1.0, "one number each"),
    ],
)
def test_a_bad_reward_is_one_clear_error_and_an_earlier_search_is_kept(parts, then, said):
    guider, sigmas, vae, _ = parts()
    with pytest.raises(ValueError, match=said):
        found((guider, sigmas, vae, Odd(then)), batch_size=2)
    half = found((guider, sigmas, vae, Odd(lambda r: r)), calls=4 * STEPS)
    before = half[2].states[0].ledger.rewards
    with pytest.raises(ValueError, match=said):
        RetortResumeSearch.execute(half[2], guider, vae, Odd(then), calls=CALLS, batch_size=2)
    assert half[2].states[0].ledger.rewards == before


def test_cancelling_gives_the_best_so_far_and_it_goes_on(parts):
    guider, sigmas, vae, _ = parts()
    _, top, saved, _, text = found((guider, sigmas, vae, Odd(stop)), batch_size=2)
    assert "stopped by: cancelled" in text and len(top["samples"]) == 2
    more = RetortResumeSearch.execute(saved, guider, vae, Odd(lambda r: r), calls=CALLS).args
    assert more[2].states[0].drawn > saved.states[0].drawn
    _, _, saved, _, text = found((guider, sigmas, vae, Odd(stop)), "best_of_n", empty(2), batch_size=2)
    assert saved.states[1] is None and "1 of 2 items were not searched" in text
    more = RetortResumeSearch.execute(saved, guider, vae, Odd(lambda r: r), calls=CALLS).args
    assert len(more[0]["samples"]) == 2
    early = Odd(stop)
    early.seen = 1
    with pytest.raises(KeyboardInterrupt):
        found((guider, sigmas, vae, early))


def test_limits_and_settings(parts):
    assert config_of(method("svdd")).lam == float("inf") and config_of(method("svdd", temperature=0.5)).lam == 2
    assert config_of(method("dts_star")).selection == "uct"
    assert budget_of(10, 0, " -1.5 ").reward == -1.5 and budget_of(0, 2.0, "").calls is None
    for given, said in (((0, 0, ""), "never end"), ((1, 0, "x"), "enough 'x'")):
        with pytest.raises(ValueError, match=said):
            budget_of(*given)
    with pytest.raises(ValueError, match="do not pay for one candidate"):
        found(parts(), calls=STEPS - 1)
    with pytest.raises(ValueError, match="flow models"):
        found(parts("eps"), transition="sde")
    with pytest.raises(ValueError, match="transition is ode, which draws no noise"):
        found(parts(), "fk", transition="ode")
    assert "stopped by: reward" in found(parts(), enough="-100")[4]
    assert "stopped by: seconds" in found(parts(), calls=0, seconds=0.3)[4]
    assert len(found(parts(), transition="sde")[1]["samples"]) == 4
