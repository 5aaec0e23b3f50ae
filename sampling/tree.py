"""Diffusion Tree Sampling and Search: a tree of partly denoised latents whose values are backed up from full rollouts.

Jain et al. 2025, "Diffusion Tree Sampling" (arXiv 2506.20701), algorithms 1 and 2. The target is p(x0) exp(lambda r),
r = r(x0); a node's value is (1/lambda) log E[exp(lambda r)] below it, estimated by the plain log-mean-exp over its
children, which are independent draws of the prior. DTS descends by Boltzmann, DTS* by UCT.

Four things are not the paper's. Its Boltzmann descent biases the values for ever (children that look bad after one
rollout are not revisited), so "uniform" is the selection for building a tree that one samples from; `draw` is algorithm
2, Boltzmann, whatever built the tree. Several leaves are expanded at once: visits are counted when a leaf is chosen,
not when its reward is back, which widens and spreads UCT as if it were (Liu et al. 2020, WU-UCT, arXiv 1810.11755).
UCT's bonus is in standard deviations of the rewards seen. The default widening C = 1 and growth alpha = 0.5 are for
hundreds or thousands of calls; with the paper's 2 and 0.8 the first 36 rollouts all begin at the root, so that a search
of a few hundred calls is best-of-N.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .search import Run, State, Trajectory
from .settings import Settings, setting

Selection = Literal["uniform", "mixed", "boltzmann", "uct"]
ROOT = 0
# Stable Diffusion's noise over signal after 1/5, 2/5, 3/5 and 4/5 of 50 steps: where the paper branches (table 2).
_NOISE = (5.09, 2.28, 1.16, 0.569)
# So many descents in a row that end in leaves already scored: widening grows too slowly to go on.
_FRUITLESS = 20_000


def soft_value(values: np.ndarray, lam: float) -> float:
    """(1/lambda) log mean exp(lambda v): the mean at lambda 0, the largest at infinity."""
    high = float(values.max())
    if len(values) == 1 or math.isinf(lam):
        return high
    if lam * (high - float(values.min())) < 1e-8:
        return float(values.mean())  # the limit; the logarithm would lose it
    return high + math.log(float(np.exp(lam * (values - high)).mean())) / lam


def boltzmann(values: np.ndarray, lam: float) -> np.ndarray:
    """Cumulative, not normalised probabilities of a choice in proportion to exp(lambda v)."""
    high = values.max()
    if math.isinf(lam):
        return np.cumsum((values == high).astype(np.float64))
    return np.cumsum(np.exp(lam * (values - high)))


def branch_steps(setting: Mapping[str, Any]) -> tuple[int, ...]:
    """The steps of a run whose latents are nearest, in noise over signal, to those that the paper branches at.

    None where steps draw no noise, and not before the last step, which draws none: all children would be equal.
    Counted in steps, as in its table 2, a flow that is shifted to high noise would branch where nothing is decided yet.
    """
    if setting["transition"]["kind"] == "ode":
        return ()
    scale = setting["path"]["noise_scale"] if setting["path"]["kind"] == "FLOW" else None
    data = setting["path"].get("sigma_data", 1.0)
    noise = [level / data if scale is None else scale * level / (1 - level) for level in setting["sigmas"][1:-2]]
    near = (min(range(len(noise)), key=lambda i: abs(math.log(noise[i] / goal))) for goal in _NOISE if noise)
    return tuple(sorted({1 + i for i in near}))


@dataclass(frozen=True)
class TreeConfig(Settings):
    """lam: the paper's lambda; 0 is the prior, inf backs up the maximum. selection: how a leaf is looked for -
    "uniform" (sampling), "boltzmann" (DTS as published), "mixed" (half of the descents each), "uct" (DTS*, to find the
    best). widening, growth: C and alpha. branch: steps at which latents are kept and may have several children, besides
    the start; None for `branch_steps`. exploration: uct only, its bonus in standard deviations of the rewards. leaves:
    expanded together; a property of the search, unlike `batch`.
    """

    lam: float = setting(1.0, 0, math.inf, step=0.05, round=1e-6,
        help="How much rewards count: 0 is plain sampling, 10 seeks the best.",
        page="How much rewards count: 0 is plain sampling, 1 samples, 10 seeks the best (for rewards that differ by "
        "about 1).",
        remedy="to seek low rewards, negate them")
    selection: Selection = setting("uniform", advanced=True,
        help="How the tree is descended while it grows: uniform has no bias, boltzmann is as published.")
    exploration: float = setting(1.0, 0, 1e3, advanced=True, step=0.05, round=1e-6,
        help="Higher tries latents that were visited less.",
        page="Bonus for latents that were visited less, in standard deviations of the rewards.", remedy="1 is usual")
    widening: float = setting(1.0, 1, 1e4, advanced=True, step=0.05, round=1e-6,
        help="A latent visited N times may have widening * N^growth children.",
        page="A latent visited N times may have widening * N^growth children; at the defaults the tree branches below "
        "the start within the first few rollouts.", remedy="1 is usual")
    growth: float = setting(0.5, 0.001, 1, advanced=True, step=0.05, round=1e-6,
        help="See widening; nearer to 1 the tree is broader and less deep.", remedy="0.5 is usual")
    branch: tuple[int, ...] | None = None
    leaves: int = setting(8, 1, 1024, advanced=True, help="Rollouts chosen together, at least batch_size.",
        page="Rollouts that are chosen together; at least batch_size, else batches stay small.")
    half: bool = setting(False, advanced=True, help="Keep the tree's latents in half precision.")

    def fresh(self, setting: Mapping[str, Any], keep: int = 4) -> Tree:
        """An empty tree for a run with this setting. ValueError where `branch` does not fit its steps."""
        steps, stochastic = len(setting["sigmas"]) - 1, setting["transition"]["kind"] != "ode"
        branch = branch_steps(setting) if self.branch is None else tuple(self.branch)
        if list(branch) != sorted(set(branch)) or any(not 0 <= b < steps for b in branch):
            raise ValueError(f"branch must ascend within 0 .. {steps - 1}, got {branch!r}")
        if branch and not stochastic:
            raise ValueError(
                f"branch {branch!r} needs steps that draw noise, and these are 'ode': with them the tree "
                "branches at its root alone; leave branch empty or choose another transition"
            )
        return Tree({**setting, "branch": list(branch), "half": self.half}, self, keep)


# C and alpha of the paper, which spends a million calls.
PAPER_WIDENING: dict[str, Any] = {"widening": 2.0, "growth": 0.8}
# DTS* with settings of ours, which the paper leaves open: chosen on the embedded model (`benchmarks.search`).
DTS_STAR = TreeConfig(lam=10.0, selection="uct", exploration=0.1, leaves=16)


class Tree(State):
    """Nodes in the order of their making, the root first: a node's number is above its parent's.

    parent, place, value, visits, number (arrays (size,)): place -1 is the root, place p a latent at step `stops[p]`,
    the last a finished one, whose value is its reward; number is the candidate that drew the node.
    """

    method = "tree"
    config: TreeConfig

    def __init__(self, setting: Mapping[str, Any], config: TreeConfig, keep: int = 4):
        super().__init__(setting, config, keep)
        self.steps = len(self.setting["sigmas"]) - 1
        self.stops = (*self.setting["branch"], self.steps)
        self.size = 0
        self._arrays = {
            "parent": np.empty(64, np.int64), "place": np.empty(64, np.int64), "value": np.empty(64, np.float64),
            "visits": np.empty(64, np.int64), "number": np.empty(64, np.int64),
        }  # fmt: skip
        self._children: list[tuple[np.ndarray, int]] = []
        self._latents: list[Tensor | None] = []
        self.descents = 0
        # Leaves that were chosen and not scored yet: (node to expand, candidate's number); and how many each node has.
        self.pending: list[tuple[int, int]] = []
        self._promised: dict[int, int] = {}
        self._rewards = np.zeros(3)  # count, sum and sum of squares, for the bonus's unit
        self._add(-1, -1, 0.0, -1, None)

    def configure(self, config: Any) -> None:
        """lambda, selection and widening may change between runs."""
        changed, self.config = config.lam != self.config.lam, config
        if changed:
            self._back_up_all()

    parent = property(lambda self: self._arrays["parent"][: self.size])
    place = property(lambda self: self._arrays["place"][: self.size])
    value = property(lambda self: self._arrays["value"][: self.size])
    visits = property(lambda self: self._arrays["visits"][: self.size])
    number = property(lambda self: self._arrays["number"][: self.size])

    def children(self, node: int) -> np.ndarray:
        """Numbers of a node's children, in the order of their making."""
        kids, count = self._children[node]
        return kids[:count]

    @property
    def leaves(self) -> np.ndarray:
        """Numbers of the finished latents; `value` has their rewards."""
        return np.flatnonzero(self.place == len(self.stops) - 1)

    def latents(self, nodes: Sequence[int]) -> Tensor:
        """(len(nodes), ...) on the CPU in float32; not the root's, which has none."""
        return torch.stack([self._latent(int(n)) for n in nodes]).float()

    def _latent(self, node: int) -> Tensor:
        latent = self._latents[node]
        if latent is None:
            raise ValueError("the root has no latent")
        return latent

    def _add(self, parent: int, place: int, value: float, number: int, latent: Tensor | None) -> int:
        node, self.size = self.size, self.size + 1
        if self.size > len(self._arrays["parent"]):
            self._arrays = {k: np.concatenate([a, np.empty_like(a)]) for k, a in self._arrays.items()}
        for name, entry in (("parent", parent), ("place", place), ("value", value), ("visits", 1), ("number", number)):
            self._arrays[name][node] = entry
        self._children.append((np.empty(2, np.int64), 0))
        self._latents.append(latent.half() if latent is not None and self.setting["half"] else latent)
        if parent >= 0:
            kids, count = self._children[parent]
            if count == len(kids):
                kids = np.concatenate([kids, np.empty_like(kids)])
            kids[count] = node
            self._children[parent] = kids, count + 1
        if place == len(self.stops) - 1:
            self._rewards += (1.0, value, value * value)
        return node

    # Algorithm 1.

    def round(self, run: Run) -> str | None:
        """Choose leaves, unless some are waiting, roll out as many as the budget pays for, and back up."""
        if not self.pending and not self._choose(run.seed):
            return "the tree is full: raise widening or growth"
        paid, cost = 0, 0
        for parent, _ in self.pending:
            cost += self.steps - self._step(parent)
            if not run.affordable(cost):
                break
            paid += 1
        if not paid:
            return "calls"
        trajectories = [self._walk(run, parent, number) for parent, number in self.pending[:paid]]
        run.finish(trajectories, frozenset(self.stops))
        for chunk, rewards in run.scored(trajectories):
            self._take_in(chunk, rewards)
        return None

    def _step(self, node: int) -> int:
        return 0 if node == ROOT else self.stops[int(self.place[node])]

    def _walk(self, run: Run, parent: int, number: int) -> Trajectory:
        if parent == ROOT:
            trajectory = run.trajectory(number)
            if self.stops[0] == 0:
                trajectory.kept.append(trajectory.x.to("cpu", copy=True))
            return trajectory
        x = self._latent(parent).to(run.sigmas)
        return Trajectory(number, x, run.generator(number), self._step(parent))

    def _take_in(self, trajectories: Sequence[Trajectory], rewards: Sequence[float]) -> None:
        touched: set[int] = set()
        for trajectory, reward in zip(trajectories, rewards, strict=True):
            parent, _ = self.pending.pop(0)
            self._promised[parent] -= 1
            node, place = parent, int(self.place[parent]) + 1
            for latent in trajectory.kept:
                node = self._add(node, place, reward, trajectory.number, latent)
                place += 1
            while parent >= 0:
                touched.add(parent)
                parent = int(self.parent[parent])
        # A node's number is above its parent's: descending order is bottom-up, and each is computed once.
        for node in sorted(touched, reverse=True):
            self._back_up(node)

    def _back_up(self, node: int) -> None:
        self.value[node] = soft_value(self.value[self.children(node)], self.config.lam)

    def _back_up_all(self) -> None:
        inner = np.flatnonzero(self.place < len(self.stops) - 1)
        for node in inner[::-1]:
            if len(self.children(node)):
                self._back_up(int(node))

    def _choose(self, seed: int) -> bool:
        """Fill `pending` with the next leaves to expand; whether there are any."""
        fruitless = 0
        chances: dict[int, np.ndarray] = {}
        while len(self.pending) < self.config.leaves and fruitless < _FRUITLESS:
            rng = np.random.default_rng([seed, self.descents])
            path, expand = self._descend(rng, chances)
            if not expand and path[-1] == ROOT:
                break  # the first leaves must be back before there is anything to descend to
            self.descents += 1
            self.visits[path] += 1
            if expand:
                self.pending.append((path[-1], self.drawn))
                self._promised[path[-1]] = self._promised.get(path[-1], 0) + 1
                self.drawn += 1
            else:
                fruitless += 1
        return bool(self.pending)

    def _descend(self, rng: np.random.Generator, chances: dict[int, np.ndarray]) -> tuple[list[int], bool]:
        """From the root to a node that may get a child (True), or to a scored leaf or a blocked node (False).

        chances: what the node's children are chosen by, kept while no value changes.
        """
        config, node, path = self.config, ROOT, [ROOT]
        how = config.selection
        if how == "mixed":
            how = "uniform" if rng.random() < 0.5 else "boltzmann"
        last = len(self.stops) - 1
        while self.place[node] < last:
            kids = self.children(node)
            if len(kids) + self._promised.get(node, 0) < config.widening * float(self.visits[node]) ** config.growth:
                return path, True
            if not len(kids):
                break
            if how == "uniform":
                choice = int(rng.integers(len(kids)))
            elif how == "boltzmann":
                if node not in chances:
                    chances[node] = boltzmann(self.value[kids], config.lam)
                choice = int(_drawn(chances[node], rng.random()))
            else:
                if node not in chances:
                    chances[node] = np.stack([self.value[kids], 1 / np.sqrt(self.visits[kids])])
                value, rarity = chances[node]
                bonus = config.exploration * self.spread * math.sqrt(math.log(self.visits[node]))
                choice = int(np.argmax(value + bonus * rarity))
                rarity[choice] = 1 / math.sqrt(self.visits[kids[choice]] + 1)
            node = int(kids[choice])
            path.append(node)
        return path, False

    @property
    def spread(self) -> float:
        """Standard deviation of the rewards seen."""
        count, total, squares = self._rewards
        return math.sqrt(max(squares / count - (total / count) ** 2, 0.0)) if count else 0.0

    # Algorithm 2.

    def draw(self, count: int, seed: int, greedy: bool = False) -> np.ndarray:
        """Numbers of `count` leaves (with repeats), each by a Boltzmann descent; greedy: by the largest value.

        No network calls. ValueError while the tree has no leaves.
        """
        if not len(self.children(ROOT)):
            raise ValueError("search: nothing has been rolled out yet, so there is nothing to draw from; search first")
        rng = np.random.default_rng([seed % (1 << 64), 0])
        open_nodes, drawn = {ROOT: count}, []
        while open_nodes:
            node, times = open_nodes.popitem()
            kids = self.children(node)
            if not len(kids):
                drawn.append(np.full(times, node))
                continue
            weights = boltzmann(self.value[kids], math.inf if greedy else self.config.lam)
            # All descents that pass here choose in one go.
            chosen, counts = np.unique(_drawn(weights, rng.random(times)), return_counts=True)
            open_nodes.update(zip(kids[chosen].tolist(), counts.tolist(), strict=True))
        return rng.permutation(np.concatenate(drawn))

    # Files.

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See `State.to_file`."""
        tensors, header = super().to_file()
        tensors |= {name: torch.from_numpy(array[: self.size].copy()) for name, array in self._arrays.items()}
        if self.size > 1:
            tensors["latents"] = torch.stack([self._latent(n) for n in range(1, self.size)])
        header |= {"descents": self.descents, "pending": [list(job) for job in self.pending]}
        return tensors, header

    def restore(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """See `State.restore`; values are backed up anew."""
        super().restore(tensors, header)
        self.descents = int(header["descents"])
        arrays = {name: tensors[name].numpy() for name in self._arrays}
        size, last = len(arrays["parent"]), len(self.stops) - 1
        latents = tensors["latents"] if size > 1 else torch.empty(0, *self.setting["shape"])
        if any(a.shape != (size,) or a.dtype != self._arrays[name].dtype for name, a in arrays.items()):
            raise ValueError("its lists differ in length or type")
        if tuple(latents.shape) != (size - 1, *self.setting["shape"]) or not bool(torch.isfinite(latents).all()):
            raise ValueError("its latents do not fit")
        parent, place = arrays["parent"], arrays["place"]
        inner = np.flatnonzero((place < last) & (np.arange(size) > ROOT))
        grown = (
            (parent[0] == place[0] == -1)
            and bool(((parent[1:] >= 0) & (parent[1:] < np.arange(1, size))).all() and (place <= last).all())
            and bool((place[1:] == place[parent[1:]] + 1).all() and np.isin(inner, parent).all())
        )
        if not grown or not np.isfinite(arrays["value"]).all() or (arrays["visits"] < 1).any():
            raise ValueError("its nodes are no tree")
        for node in range(1, size):
            row = {name: array[node].item() for name, array in arrays.items() if name != "visits"}
            self._add(**row, latent=latents[node - 1])
        self.visits[:] = arrays["visits"]
        self._back_up_all()
        for node, number in header["pending"]:
            if not (0 <= node < size and place[node] < last):
                raise ValueError("a leaf in waiting has no place")
            self.pending.append((int(node), int(number)))
            self._promised[int(node)] = self._promised.get(int(node), 0) + 1


def _drawn(cumulative: np.ndarray, uniform: Any) -> Any:
    """Index or indices by inversion; the last one where rounding leaves the uniform at the very top."""
    return np.minimum(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"), len(cumulative) - 1)
