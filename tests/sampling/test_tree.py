"""Tree search against exact answers: backups, importance weights, widening, the tilted law; and a tree of 100,000."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch

from retort.sampling.grids import simple
from retort.sampling.particles import BestOfConfig
from retort.sampling.path import FLOW, VE
from retort.sampling.prior import Prior
from retort.sampling.schedule import DiscreteSchedule, FlowSchedule
from retort.sampling.search import Budget, Trajectory, search
from retort.sampling.transition import Transition
from retort.sampling.tree import DTS_STAR, PAPER_WIDENING, ROOT, TreeConfig, boltzmann, branch_steps, soft_value

each_path = pytest.mark.parametrize("path", [VE, FLOW], ids=["VE", "FLOW"])
REWARDS = [[0.3, -1.2, 2.0], [0.9], [-0.4, 0.1]]


def setting(steps=3, shape=(1, 1, 1), kind="ancestral"):
    sigmas = [1 - i / steps for i in range(steps)] + [0.0]
    return {"path": {"kind": "FLOW", "noise_scale": 1.0}, "shape": list(shape), "transition": {"kind": kind},
            "sigmas": sigmas}  # fmt: skip


def grow(tree, parent, rewards):
    """Leaves with these rewards, each on a chain of its own below `parent`."""
    below = len(tree.stops) - 1 - int(tree.place[parent])
    for reward in rewards:
        tree.pending.append((parent, tree.drawn))
        tree._promised[parent] = tree._promised.get(parent, 0) + 1
        kept = [torch.full((1, 1, 1), reward)] * below
        trajectory = Trajectory(tree.drawn, torch.zeros(1), torch.Generator(), kept=kept)
        tree.drawn += 1
        tree._take_in([trajectory], [reward])


def hand_made(lam, rewards=REWARDS):
    tree = TreeConfig(lam=lam, branch=(1,)).fresh(setting())
    for some in rewards:
        grow(tree, ROOT, some[:1])
    for node, some in zip(tree.children(ROOT).tolist(), rewards, strict=True):
        grow(tree, node, some[1:])
    return tree


def nested(lam, rewards=REWARDS):
    def soft(values):
        return math.log(sum(math.exp(lam * v) for v in values) / len(values)) / lam

    return [soft(some) for some in rewards], soft([soft(some) for some in rewards])


@pytest.mark.parametrize("lam", [0.1, 1.0, 3.7])
def test_backup_is_the_nested_log_mean_exp(lam):
    """Each node's value is the soft maximum of its children's values."""
    tree, (children, root) = hand_made(lam), nested(lam)
    assert tree.value[tree.children(ROOT)] == pytest.approx(children, abs=1e-12)
    assert tree.value[ROOT] == pytest.approx(root, abs=1e-12)


def test_limits_of_the_backup():
    assert hand_made(math.inf).value[ROOT] == 2.0 == pytest.approx(hand_made(500.0).value[ROOT], abs=0.01)
    mean = np.mean([np.mean(some) for some in REWARDS])
    assert hand_made(0.0).value[ROOT] == pytest.approx(mean, abs=1e-15)
    assert hand_made(1e-7).value[ROOT] == pytest.approx(mean, abs=1e-6)
    assert soft_value(np.array([1e5, -1e5]), 10.0) == pytest.approx(1e5 - math.log(2) / 10)
    assert soft_value(np.array([3.0]), 2.0) == 3.0
    assert np.diff(boltzmann(np.array([5.0, 1.0, 5.0]), math.inf), prepend=0).tolist() == [1, 0, 1]


def test_permuted_children_have_the_same_values_and_chances():
    mixed = [REWARDS[2][::-1], REWARDS[0][1:] + REWARDS[0][:1], REWARDS[1]]
    one, other = hand_made(1.3), hand_made(1.3, mixed)
    assert one.value[ROOT] == pytest.approx(other.value[ROOT], abs=1e-12)
    chances = [np.diff(boltzmann(t.value[t.children(ROOT)], 1.3), prepend=0) for t in (one, other)]
    assert chances[0][[2, 0, 1]] == pytest.approx(chances[1], abs=1e-12)
    drawn = [np.sort(t.value[t.draw(40_000, 1)]) for t in (one, other)]
    assert drawn[0].mean() == pytest.approx(drawn[1].mean(), abs=0.02)


def test_with_the_root_alone_it_is_importance_sampling():
    """Value and draw probabilities are those of self-normalised importance sampling."""
    rewards = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    tree = TreeConfig(lam=2.0, branch=()).fresh(setting())
    grow(tree, ROOT, rewards)
    weights = np.exp(2.0 * np.array(rewards))
    assert tree.value[ROOT] == pytest.approx(math.log(weights.mean()) / 2.0, abs=1e-12)
    counts = np.bincount(tree.draw(200_000, 5), minlength=201)[1:] / 200_000
    assert 0.5 * np.abs(counts - weights / weights.sum()).sum() < 0.02
    assert (tree.draw(7, 0, greedy=True) == 1 + int(np.argmax(rewards))).all()


@each_path
@pytest.mark.parametrize("leaves", [1, 8, 64])
def test_widening(leaves, path, gaussian):
    """ceil(C N^alpha) children after N descents, however many leaves go together."""
    tree = TreeConfig(leaves=leaves, branch=(1,), **PAPER_WIDENING).fresh(setting())
    model = gaussian(path)
    run(model, tree.config, path, 1300, state=(state := tree.config.fresh(started(path), 4)))
    n = int(state.visits[ROOT]) - 1
    assert n >= 400
    assert len(state.children(ROOT)) + state._promised.get(ROOT, 0) == math.ceil(2 * n**0.8)
    for node in range(1, state.size):
        allowed = 1 if state.place[node] == 0 and state.visits[node] == 1 else math.ceil(2 * state.visits[node] ** 0.8)
        assert len(state.children(node)) <= allowed
    assert (state.number[state.children(ROOT)] == np.sort(state.number[state.children(ROOT)])).all()


def levels(path, steps=3):
    top = 1.0 if path.kind == "FLOW" else 14.0
    return torch.cat([torch.linspace(top, 0.1, steps), torch.zeros(1)])


def started(path):
    transition = {"kind": "ancestral", "noise_level": 0.7}
    return {"path": {"kind": path.kind, "noise_scale": 1.0}, "shape": [1, 1, 1], "transition": transition,
            "sigmas": levels(path).tolist(), "identity": ""}  # fmt: skip


def run(model, config, path, calls, **options):
    given = {"evaluate": lambda x: x.flatten(), "seed": 0, "batch": 64, "sigmas": levels(path), **options}
    lent = {name: given.pop(name) for name in ("batch", "mixed_levels", "calls_per_eval", "identity") if name in given}
    prior = Prior(model, path, given.pop("sigmas"), (1, 1, 1), **lent)
    return search(prior, config, Budget(calls=calls), given.pop("evaluate"), **given)


def test_widening_to_the_letter():
    """One leaf at a time, no network: N = 1000 -> 503, 3000 -> 1210."""
    tree = TreeConfig(leaves=1, branch=(), **PAPER_WIDENING).fresh(setting())
    for n in range(1, 3001):
        assert tree._choose(0) or tree.descents == n
        while tree.pending:
            tree._take_in([Trajectory(0, torch.zeros(1), torch.Generator(), kept=[torch.zeros(1, 1, 1)])], [0.0])
        if tree.descents >= 3000:
            break
    n = tree.descents
    assert len(tree.children(ROOT)) == math.ceil(2 * n**0.8)
    assert math.ceil(2 * 1000**0.8) == 503 and math.ceil(2 * 3000**0.8) == 1210


@each_path
@pytest.mark.parametrize("selection", ["uniform", "mixed", "boltzmann", "uct"])
def test_calls_are_the_steps_below_each_expanded_node(selection, path, gaussian):
    """Also, every latent at a branch step is a node, and its first child was made with it."""
    model = gaussian(path)
    tree = run(model, TreeConfig(selection=selection, widening=1.0, growth=0.5), path, 900,
               sigmas=levels(path, 10)).state  # fmt: skip
    first = tree.number[1:] != tree.number[tree.parent[1:]]
    start = np.array([tree._step(int(p)) for p in tree.parent[1:]])
    assert sum(len(s) for s in model.sigmas) == int((tree.steps - start)[first].sum()) == tree.ledger.calls
    assert tree.ledger.rewards == len(tree.leaves) == int(first.sum()) == len(set(tree.number[1:].tolist()))
    assert tree.stops == {"VE": (6, 8, 10), "FLOW": (2, 3, 5, 6, 10)}[path.kind]
    assert tree.latents(tree.leaves).flatten().double().numpy() == pytest.approx(tree.value[tree.leaves], abs=1e-6)


def test_it_branches_at_the_papers_noise():
    """Table 2: after 10, 20, 30 and 40 of Stable Diffusion's 50 steps; a shifted flow gets there later."""
    rows = [
        (VE, DiscreteSchedule(), (10, 20, 30, 40)),
        (FLOW, FlowSchedule(1.0), (8, 15, 23, 32)),
        (FLOW, FlowSchedule(3.0), (19, 28, 36, 42)),
    ]
    for path, schedule, steps in rows:
        given = {**started(path), "sigmas": simple(schedule, 50).tolist()}
        assert branch_steps(given) == steps
    assert branch_steps({**given, "transition": {"kind": "ode"}}) == branch_steps({**given, "sigmas": [1.0, 0.0]}) == ()


@each_path
def test_it_does_not_branch_before_a_step_without_noise(path, gaussian):
    """The last step is x0 itself: children of the latent before it would be equal, and each cost a call."""
    grid = many_steps(path)[::5]
    assert len(grid) == 5 and branch_steps({**started(path), "sigmas": grid.tolist()})[-1] <= 2
    tree = run(gaussian(path), TreeConfig(), path, 200, sigmas=grid, evaluate=lambda x: x.flatten()).state
    values = tree.value[tree.leaves]
    assert tree.stops[-2] <= 2 and len(np.unique(values)) == len(values) > 50


@each_path
def test_the_safe_mode_reaches_the_tilted_law(path, mixture):
    """Uniform while building: 2,000 rollouts, exact reverse kernel."""
    model = mixture(path)
    tree = sampled(model, TreeConfig(leaves=50, branch=(1, 2, 3), **PAPER_WIDENING), 6900).state
    assert 1900 <= len(tree.leaves) <= 2100
    value, masses = model.tilted()
    assert abs(tree.value[ROOT] - value) < 0.1
    drawn = tree.latents(tree.draw(20_000, 1))
    assert float((model.masses(drawn) - masses).abs().sum() / 2) < 0.03
    assert float(drawn.mean()) == pytest.approx(float((masses * (model.mu + 0.2)).sum()), abs=0.1)


def sampled(model, config, calls, sigmas=None, **options):
    given = {"seed": model.seed, "evaluate": model.reward, "budget": Budget(calls=calls), **options}
    levels = model.sigmas if sigmas is None else sigmas
    prior = Prior(model, model.path, levels, (1, 1, 1), batch=given.pop("batch", 64))
    return search(prior, config, given.pop("budget"), given.pop("evaluate"), **given)


def default_calls():
    from retort.nodes.search import RetortTreeSearch

    return next(one.default for one in RetortTreeSearch.define_schema().inputs if one.id == "calls")


def many_steps(path):
    schedule = FlowSchedule(3.0) if path.kind == "FLOW" else DiscreteSchedule()
    return simple(schedule, 20).double()


@each_path
@pytest.mark.parametrize("config", [TreeConfig(), DTS_STAR], ids=["dts", "dts_star"])
def test_the_node_as_it_comes_branches_below_the_root(path, config, mixture):
    """20 steps and the node's own 400 calls: several latents at branch steps have more than one child."""
    tree = sampled(mixture(path), config, default_calls(), many_steps(path)).state
    inner = [node for node in range(1, tree.size) if tree.place[node] < len(tree.stops) - 1]
    assert sum(len(tree.children(node)) > 1 for node in inner) >= 5
    assert len(tree.leaves) > 1.3 * default_calls() / 20 and len(tree.children(ROOT)) < len(tree.leaves) / 2
    # The paper's widening leaves it best of N at as many calls.
    plain = sampled(mixture(path), TreeConfig(**PAPER_WIDENING), default_calls(), many_steps(path)).state
    assert len(plain.children(ROOT)) == len(plain.leaves) == default_calls() // 20


@each_path
def test_the_value_of_the_root_is_without_bias(path, mixture):
    """Over searches of 400 calls the mean of exp(lambda (v - V)) is 1 within its error: V is known exactly."""
    value, found = mixture(path).tilted()[0], []
    for seed in range(60):
        tree = sampled(mixture(path, seed=10_000 + seed), TreeConfig(), 400, many_steps(path), seed=seed).state
        found.append(tree.value[ROOT])
    weights = np.exp(np.array(found) - value)
    error = weights.std(ddof=1) / math.sqrt(len(weights))
    assert error < 0.08
    assert abs(weights.mean() - 1) < 3 * error


@each_path
def test_the_published_selection_stays_near_the_target(path, mixture):
    """Boltzmann selection while building stays biased low; its draws are still far closer to the target than p."""
    model = mixture(path)
    tree = sampled(model, TreeConfig(selection="boltzmann", leaves=50, branch=(1, 2, 3)), 6900).state
    value, masses = model.tilted()
    off = float((model.masses(tree.latents(tree.draw(20_000, 1))) - masses).abs().sum() / 2)
    assert off < float((model.w - masses).abs().sum() / 2) / 3
    assert -1.0 < tree.value[ROOT] - value < 0.2


@each_path
def test_lambda_zero_is_the_prior(path, mixture):
    model = mixture(path)
    tree = sampled(model, TreeConfig(lam=0.0, leaves=50, branch=(1, 2, 3), **PAPER_WIDENING), 6900).state
    drawn = tree.latents(tree.draw(20_000, 1))
    assert float((model.masses(drawn, 0.0) - model.w).abs().sum() / 2) < 0.04
    assert tree.value[ROOT] == pytest.approx(float((model.w * model.mu).sum()) * 0.8, abs=0.2)


@each_path
def test_the_search_beats_best_of_n(path, mixture):
    """A mode of 2 % near 3, reward -(x - 3.2)^2, equal calls."""

    def best(config, seed):
        model = mixture(path, seed=seed, weights=(0.5, 0.48, 0.02))
        return sampled(model, config, 480, evaluate=lambda x: -((x.flatten() - 3.2) ** 2)).best.reward

    search_for = TreeConfig(selection="uct", leaves=4, widening=1.0, growth=0.6, branch=(1, 2, 3), exploration=0.5)
    tree, plain = (np.mean([best(c, seed) for seed in range(12)]) for c in (search_for, BestOfConfig()))
    assert tree > plain


def test_a_spike_is_ignored_by_soft_values_and_found_by_the_maximum():
    """Over-optimisation: prior mass 1e-4 with a high reward."""
    soft, hard = (TreeConfig(lam=lam, branch=(1, 2, 3)).fresh(setting(4)) for lam in (1.0, math.inf))
    rng = np.random.default_rng(0)
    for tree in (soft, hard):
        grow(tree, ROOT, [*rng.normal(size=9_999).tolist(), 6.0])
    value = 0.5  # log E exp(N(0, 1))
    assert soft.value[ROOT] == pytest.approx(value, abs=0.1) and hard.value[ROOT] == 6.0
    assert (soft.value[soft.draw(2000, 0)] == 6.0).mean() < 0.06
    assert (hard.value[hard.draw(50, 0)] == 6.0).all()


@each_path
def test_without_noise_it_branches_at_the_root_alone(path, gaussian):
    tree = run(gaussian(path), TreeConfig(), path, 90, transition=Transition("ode")).state
    assert tree.stops == (3,) and len(tree.children(ROOT)) == len(tree.leaves) == 30
    with pytest.raises(ValueError, match="with them the tree branches at its root alone"):
        run(gaussian(path), TreeConfig(branch=(1,)), path, 90, transition=Transition("ode"))


def test_a_tree_that_cannot_grow_says_so(gaussian):
    result = run(gaussian(FLOW), TreeConfig(widening=1.0, growth=0.001, branch=()), FLOW, 90)
    assert result.stopped == "the tree is full: raise widening or growth" and len(result.state.leaves) == 2


def test_half_precision_is_what_the_tree_keeps(gaussian):
    full, half = (run(gaussian(VE), TreeConfig(half=h), VE, 90).state for h in (False, True))
    assert half.to_file()[0]["latents"].dtype == torch.float16
    assert half.latents(half.leaves).numpy() == pytest.approx(full.latents(full.leaves).numpy(), abs=1e-2)
    with pytest.raises(ValueError, match="was made with half True, and this one has False"):
        run(gaussian(VE), TreeConfig(half=False), VE, 90, state=half)


def test_lambda_may_change_between_runs(gaussian):
    tree = run(gaussian(FLOW), TreeConfig(lam=1.0), FLOW, 300).state
    soft = tree.value[ROOT]
    run(gaussian(FLOW), TreeConfig(lam=math.inf), FLOW, 3, state=tree)
    assert tree.value[ROOT] == tree.value.max() > soft


def test_an_empty_tree_has_nothing_to_draw():
    with pytest.raises(ValueError, match="nothing has been rolled out yet"):
        TreeConfig().fresh(setting(10)).draw(1, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("lam", -1.0), ("lam", math.nan), ("selection", "best"), ("widening", 0.5), ("growth", 0.0), ("growth", 1.5),
     ("exploration", -1.0), ("leaves", 0), ("branch", (3, 2)), ("branch", (0, 10)), ("branch", (-1,))],
)  # fmt: skip
def test_settings_are_checked(field, value):
    with pytest.raises(ValueError, match=f"{field} must .*{str(value)[:3].strip('(')}"):
        TreeConfig(**{field: value}).fresh(setting(10))


def test_a_forged_tree_is_refused(gaussian):
    tree = run(gaussian(FLOW), TreeConfig(), FLOW, 300).state
    tensors, header = tree.to_file()
    for name, node, value in [("parent", 5, 7), ("parent", 5, -1), ("parent", 0, 0), ("place", 5, 9), ("place", 0, 0),
                              ("visits", 3, 0)]:  # fmt: skip
        forged = tensors[name].clone()
        forged[node] = value
        with pytest.raises(ValueError, match="its nodes are no tree"):
            type(tree).from_file({**tensors, name: forged}, header, tree.config)
    with pytest.raises(ValueError, match="a leaf in waiting has no place"):
        type(tree).from_file(tensors, {**header, "pending": [[tree.size, 1]]}, tree.config)


@pytest.mark.parametrize("selection", ["uniform", "boltzmann", "uct"])
def test_selection_and_backup_in_a_tree_of_100_000(selection, slowness):
    """The target is 1 ms a leaf on an idle core (measured: 0.3); the margin is for one that slows meanwhile."""
    tree = TreeConfig(selection=selection, leaves=16).fresh(setting(10))
    rng = np.random.default_rng(0)
    kept = [torch.zeros(1, 1, 1)] * 5

    def iterate():
        tree._choose(0)
        while tree.pending:
            jobs = tree.pending[:8]
            trajectories = [
                Trajectory(n, kept[0], None, kept=kept[: len(tree.stops) - 1 - int(tree.place[p])]) for p, n in jobs
            ]
            tree._take_in(trajectories, rng.normal(size=len(trajectories)).tolist())

    # Wide at the top, as a search by uniform selection makes it.
    grow_fast(tree, 20_000, rng)
    assert tree.size >= 100_000
    took, leaves = [], tree.drawn
    for _ in range(20):
        before = time.process_time()
        iterate()
        took.append(time.process_time() - before)
    per_leaf = sorted(took)[10] / 16
    assert tree.drawn - leaves == 320
    assert per_leaf < 2e-3 * slowness


def grow_fast(tree, count, rng):
    """Chains below the root, added without a backup for each."""
    for number in range(count):
        node, reward = ROOT, float(rng.normal())
        for place in range(len(tree.stops)):
            node = tree._add(node, place, reward, number, torch.zeros(1, 1, 1))
    tree.drawn = count
    tree.visits[ROOT] = 90_000  # fewer than its children allow, so that descents go below it
    tree._back_up_all()
