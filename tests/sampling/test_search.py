"""What all searches share: one candidate is the plain sampler, batches change nothing, accounts, resume, bad input."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch

from retort.sampling.find import FindConfig
from retort.sampling.particles import BestOfConfig, SteeringConfig, ValueConfig
from retort.sampling.path import FLOW, VE, VP, NoisePath
from retort.sampling.prior import Prior
from retort.sampling.search import Best, Budget, candidate_seed, search, seed_of
from retort.sampling.standard import SAMPLERS, SamplingDiverged
from retort.sampling.transition import Transition
from retort.sampling.tree import TreeConfig

SHAPE = (4, 3, 5)
STEPS = 10
METHODS = {
    "tree": TreeConfig(leaves=6, half=True),
    "tree, uct": TreeConfig(selection="uct", leaves=5),
    "best of N": BestOfConfig(),
    "steering": SteeringConfig(particles=3, lam=3.0),
    "values": ValueConfig(candidates=3, lam=2.0),
    "find": FindConfig(samples=4, epochs=2),
}
each_method = pytest.mark.parametrize("config", METHODS.values(), ids=METHODS.keys())
PATHS = {"VE": VE, "FLOW": FLOW, "FLOW 8": NoisePath("FLOW", 8.0), "VP": VP}
each_path = pytest.mark.parametrize("path", [VE, FLOW], ids=["VE", "FLOW"])


def levels(path, steps=STEPS):
    top = 1.0 if path.kind == "FLOW" else 14.0
    return torch.cat([torch.linspace(top, 0.05, steps), torch.zeros(1)])


def brightness(latents):
    return latents.flatten(1).mean(1)


PRIOR = {field.name for field in fields(Prior)}


def run(model, config, path=FLOW, calls=200, *, seed=3, batch=4, evaluate=brightness, **options):
    budget, sigmas = options.pop("budget", Budget(calls=calls)), options.pop("sigmas", levels(path))
    lent = {name: options.pop(name) for name in PRIOR & set(options)}
    prior = Prior(model, path, sigmas, SHAPE, batch=batch, **lent)
    return search(prior, config, budget, evaluate, seed=seed, **options)


def same_files(one, other):
    (a, header_a), (b, header_b) = one.to_file(), other.to_file()
    for header in (header_a, header_b):
        header["ledger"] = {k: v for k, v in header["ledger"].items() if k in ("calls", "rewards")}
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    header_a["best"] = [row[:2] for row in header_a["best"]]
    header_b["best"] = [row[:2] for row in header_b["best"]]
    header_a.pop("history")
    header_b.pop("history")
    assert header_a == header_b


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize(
    "config",
    [TreeConfig(leaves=1), BestOfConfig(), SteeringConfig(particles=1), ValueConfig(candidates=1)],
    ids=["tree", "best of N", "steering", "values"],
)
@pytest.mark.parametrize(("kind", "name"), [("ancestral", "euler_ancestral"), ("ode", "euler")])
def test_one_candidate_is_the_plain_sampler(kind, name, config, path, gaussian, noise):
    if kind == "ode" and isinstance(config, (SteeringConfig, ValueConfig)):
        pytest.skip("refused")
    result = run(gaussian(path), config, path, STEPS, transition=Transition(kind))
    # Core's streams: the start from seed, the fresh noise from seed + 1.
    start = noise((1, *SHAPE), 3)
    x = path.add_noise(torch.zeros_like(start), levels(path)[0], start)
    model = gaussian(path)
    extra = {"seed": 3} if name == "euler_ancestral" else {}
    plain = SAMPLERS[name](lambda x, sigma, **_: model(x, sigma), x, levels(path), extra, disable=True, path=path)
    if path.kind == "VP":
        torch.testing.assert_close(result.best.latent, plain[0], rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(result.best.latent, plain[0])
    assert result.ledger.calls == STEPS and result.best.reward == float(brightness(plain)[0])


@each_method
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_the_result_does_not_depend_on_the_batch(config, batch, gaussian):
    expected, got = (run(gaussian(FLOW), config, batch=b) for b in (5, batch))
    same_files(expected.state, got.state)
    assert expected.ledger.calls == got.ledger.calls


@each_path
@each_method
def test_every_call_is_counted_and_none_is_over_the_budget(config, path, gaussian):
    model = gaussian(path)
    result = run(model, config, path, calls=401, calls_per_eval=2)
    evals = sum(len(s) for s in model.sigmas)
    assert result.ledger.calls == 2 * evals <= 401
    assert result.ledger.forwards == len(model.sigmas)
    assert all(len(s) <= 4 for s in model.sigmas)
    # Without leave, a batch has one level.
    assert all(bool((s == s[0]).all()) for s in model.sigmas)
    assert result.stopped == "calls"
    assert result.top == sorted(result.top, key=lambda c: -c.reward)
    assert len(result.top) == 4 and result.best is result.top[0]
    assert result.state.best.history[-1][1] == result.best.reward


@each_method
def test_rewards_are_counted(config, gaussian):
    seen = []

    def evaluate(latents):
        seen.append(len(latents))
        return brightness(latents)

    result = run(gaussian(FLOW), config, evaluate=evaluate)
    assert result.ledger.rewards == sum(seen) and max(seen) <= 4


@each_path
@each_method
@pytest.mark.parametrize("file", [False, True], ids=["in memory", "from a file"])
def test_resumed_is_uninterrupted(config, path, file, gaussian):
    """Also where the first budget ends in the middle of an iteration's leaves."""
    expected = run(gaussian(path), config, path, calls=600)
    first = run(gaussian(path), config, path, calls=233)
    state = first.state
    if file:
        tensors, header = state.to_file()
        header = json.loads(json.dumps(header))
        state = type(state).from_file({k: v.clone() for k, v in tensors.items()}, header, config)
        same_files(state, first.state)
    second = run(gaussian(path), config, path, calls=600 - first.ledger.calls, state=state)
    assert second.state is state and second.ledger.calls == expected.ledger.calls
    same_files(expected.state, state)


@each_method
@pytest.mark.parametrize("after", [1, 25, 61])
def test_whatever_a_callback_raises_the_state_is_whole(config, after, gaussian):
    class Cancelled(Exception):
        pass

    state = config.fresh({**setting(), "identity": "m"}, 4)
    told = []

    def callback(told_state):
        assert told_state is state
        told.append(told_state.ledger.calls)
        if len(told) == after:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(gaussian(FLOW), config, calls=600, state=state, callback=callback, identity="m")
    assert state.ledger.calls == told[-1]
    assert bool(state.best.found) or after < 25
    type(state).from_file(*state.to_file(), config)
    run(gaussian(FLOW), config, calls=200, state=state, identity="m")
    # Work in flight was paid for and lost; all else is what an uninterrupted search has.
    expected = config.fresh({**setting(), "identity": "m"}, 4)
    while expected.drawn < state.drawn:
        run(gaussian(FLOW), config, calls=40, state=expected, identity="m")
    if expected.drawn == state.drawn and not isinstance(config, TreeConfig):
        assert [c.number for c in state.best.found] == [c.number for c in expected.best.found]


def setting(path=FLOW):
    return {
        "shape": list(SHAPE), "sigmas": levels(path).tolist(), "path": {"kind": path.kind, "noise_scale": 1.0},
        "transition": {"kind": "ancestral", "noise_level": 0.7},
    }  # fmt: skip


@pytest.mark.parametrize("name", ["tree", "tree, uct"])
def test_a_tree_that_was_cancelled_grows_as_if_it_had_not_been(name, gaussian):
    config, trees = METHODS[name], []

    def stop(state):
        if state.ledger.calls >= 152:
            raise KeyboardInterrupt

    for callback in (stop, None):
        tree = config.fresh({**setting(), "identity": ""}, 4)
        if callback is not None:
            with pytest.raises(KeyboardInterrupt):
                run(gaussian(FLOW), config, state=tree, callback=callback)
            assert tree.pending
        while len(tree.leaves) < 60:
            run(gaussian(FLOW), config, calls=STEPS, state=tree)
        trees.append(tree)
    assert torch.equal(trees[0].latents(trees[0].leaves[:60]), trees[1].latents(trees[1].leaves[:60]))
    assert trees[0].parent[:200].tolist() == trees[1].parent[:200].tolist()


@pytest.mark.parametrize("config", [TreeConfig(leaves=16, widening=1.0), SteeringConfig()], ids=["tree", "steering"])
def test_levels_mix_where_the_caller_says_so(config, gaussian):
    model = gaussian(FLOW)
    mixed, grouped = run(model, config, calls=500, mixed_levels=True), run(gaussian(FLOW), config, calls=500)
    same_files(mixed.state, grouped.state)
    if isinstance(config, TreeConfig):
        assert any(bool((s != s[0]).any()) for s in model.sigmas)
        assert mixed.ledger.forwards <= grouped.ledger.forwards


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda r: r * float("nan"), "the reward of image 1 of 2 is nan"),
        (lambda r: r + float("inf"), "the reward of image 1 of 2 is inf"),
        (lambda r: r[:, None], r"the reward answered shape \(2, 1\) for 2 images"),
        (lambda r: r[:1], r"the reward answered shape \(1,\) for 2 images"),
        (lambda r: r.mean(), r"the reward answered shape \(\) for 2 images"),
        (lambda r: r.tolist(), "the reward answered list for 2 images"),
    ],
)
@each_method
def test_a_bad_reward_is_named_and_the_state_kept(config, broken, message, gaussian):
    first = run(gaussian(FLOW), config, calls=160)
    before = first.best
    size = len(first.state.to_file()[0].get("parent", ()))

    def evaluate(latents):
        # Methods that first score fewer than a batch meet the fault in their first whole one.
        return broken(brightness(latents)) if len(latents) == 2 else brightness(latents)

    with pytest.raises(ValueError, match=message):
        run(gaussian(FLOW), config, calls=600, batch=2, state=first.state, evaluate=evaluate)
    assert first.state.best.found[0].reward >= before.reward
    assert len(first.state.to_file()[0].get("parent", ())) >= size
    run(gaussian(FLOW), config, calls=200, state=first.state)


def test_a_reward_that_raises_passes_through(gaussian):
    def evaluate(latents):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(gaussian(FLOW), BestOfConfig(), evaluate=evaluate)


def test_a_model_that_diverges_is_named():
    with pytest.raises(SamplingDiverged, match="NaN or infinity; run the model in bf16"):
        run(lambda x, sigma: x * float("nan"), BestOfConfig())
    with pytest.raises(ValueError, match=r"the model answered \(4, 4, 3\) to latents of \(4, 4, 3, 5\)"):
        run(lambda x, sigma: x[..., 0], BestOfConfig())


@each_method
def test_it_stops_at_a_reward_and_in_time(config, gaussian):
    result = run(gaussian(FLOW), config, budget=Budget(reward=-5.0))
    assert result.stopped == "reward" and result.best.finished
    result = run(gaussian(FLOW), config, budget=Budget(seconds=0.02))
    assert result.stopped == "seconds" and result.ledger.seconds >= 0.02


def test_budgets_that_make_no_sense():
    with pytest.raises(ValueError, match="would never end"):
        Budget()
    for bad in ({"calls": 0}, {"calls": -3}, {"seconds": 0}, {"seconds": float("nan")}, {"reward": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(bad)).replace('reward', 'enough')} must"):
            Budget(**bad)


@each_method
def test_a_budget_too_small_for_anything_is_named(config, gaussian):
    with pytest.raises(ValueError, match="9 calls do not pay for one candidate, which takes 10 steps"):
        run(gaussian(FLOW), config, calls=9)


def test_settings_that_make_no_sense(gaussian):
    def attempt(**changes):
        run(gaussian(FLOW), BestOfConfig(), calls=50, **{"batch": 1, **changes})

    for sigmas in ([1.0, 0.5], [0.5, 1.0, 0.0]):
        with pytest.raises(ValueError, match="sigmas must descend and end in 0"):
            attempt(sigmas=torch.tensor(sigmas))
    for sigmas in ([], [0.0], [1.0]):
        with pytest.raises(ValueError, match="sigmas: the schedule has no steps"):
            attempt(sigmas=torch.tensor(sigmas))
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        attempt(batch=0)
    with pytest.raises(ValueError, match="kind 'sde' is a step of flow models"):
        attempt(transition=Transition("sde"), path=VE)
    attempt(transition=Transition("sde"))


@each_method
def test_a_state_of_another_search_is_refused(config, gaussian):
    state = run(gaussian(FLOW), config, identity="a").state
    with pytest.raises(ValueError, match="was made with identity 'a', and this one has 'b'"):
        run(gaussian(FLOW), config, identity="b", state=state)
    with pytest.raises(ValueError, match="was made with path"):
        run(gaussian(VE), config, VE, identity="a", state=state)
    other = BestOfConfig() if not isinstance(config, BestOfConfig) else TreeConfig()
    with pytest.raises(ValueError, match=f"the saved search is '{state.method}'"):
        run(gaussian(FLOW), other, identity="a", state=state)


@each_method
def test_a_broken_file_is_refused(config, gaussian):
    state = run(gaussian(FLOW), config).state
    tensors, header = state.to_file()

    def refused(tensors, header):
        with pytest.raises(ValueError, match="is no saved .* or it was cut off or altered"):
            type(state).from_file(tensors, header, config)

    for name in header:
        refused(tensors, {k: v for k, v in header.items() if k != name})
    refused(tensors, {**header, "method": "other"})
    refused(tensors, {**header, "version": 2})
    refused(tensors, {**header, "drawn": -1})
    refused(tensors, {**header, "best": "x"})
    refused(tensors, {**header, "setting": []})
    for name, tensor in tensors.items():
        # A population is optional.
        if name != "latents" or "parent" in tensors:
            refused({k: v for k, v in tensors.items() if k != name}, header)
        refused({**tensors, name: tensor[:-1]}, header)
        if tensor.is_floating_point():
            refused({**tensors, name: tensor * float("nan")}, header)


def test_seeds_and_noise_of_ones_own(gaussian, noise):
    """Candidates are told apart by number; the noise may come from elsewhere and the start from an image."""
    assert candidate_seed(7, 0) == 7 and candidate_seed(7, 1) != candidate_seed(7, 2) != candidate_seed(8, 2)
    assert seed_of(1, "a") == seed_of(1, "a") != seed_of(1, "b")
    image = torch.full((1, *SHAPE), 2.0)
    model = gaussian(FLOW)
    run(model, BestOfConfig(), calls=STEPS, noise=lambda m: noise(SHAPE, 50 + m), latent=image,
        sigmas=torch.linspace(0.5, 0, STEPS + 1))  # fmt: skip
    assert torch.equal(model.inputs[0], FLOW.add_noise(image, torch.tensor(0.5), noise(SHAPE, 50)[None]))


def test_the_best_are_kept_in_order():
    best = Best(keep=2)
    x = torch.arange(3.0).view(3, 1)
    best.offer(x, [9.0, 1.0, 2.0], [0, 1, 2], 10, finished=False)
    assert [c.reward for c in best.found] == [9.0, 2.0] and best.reward == float("-inf") and not best.history
    best.offer(x, [1.0, 0.5, 1.0], [3, 4, 5], 20)
    assert [(c.reward, c.number) for c in best.found] == [(1.0, 3), (1.0, 5)]
    best.offer(x[:1], [7.0], [6], 30, finished=False)
    best.offer(x[:1], [3.0], [7], 40)
    assert [c.number for c in best.found] == [7, 3] and best.history == [(20, 1.0), (40, 3.0)]
