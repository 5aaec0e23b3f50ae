"""What the benchmarks of search share: searches of the embedded model against a clock, kept in files; statistics.

A curve's calls are network calls, one per latent and guidance branch; its seconds are the search's own, decoding and
scoring included.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files.atomic import write_json
from ..hosts.headless.host import host
from ..hosts.methods import Method, Run
from ..models.reward import judge_reward
from ..rewards.contract import Reward
from ..rewards.scoring import score
from ..sampling.accounts import Budget
from ..sampling.grids import simple
from ..sampling.search import Config, State, search
from ..sampling.transition import Transition
from .report import Figure


@dataclass(frozen=True)
class Task:
    """What is searched: the embedded model of a kind, a prompt, guidance, steps; batch: latents per forward."""

    prompt: str
    kind: str = "flow"
    cfg: float = 1.0
    steps: int = 20
    batch: int = 16


@dataclass(frozen=True)
class Curve:
    """rises: (calls, seconds, best reward) at each new best; calls, rewards, seconds: of the whole run."""

    rises: list[tuple[int, float, float]]
    calls: int
    rewards: int
    seconds: float

    def best(self, limits: Sequence[float] | np.ndarray, axis: int = 0) -> np.ndarray:
        """Best reward (len(limits),) within so many calls (axis 0) or seconds (axis 1); -inf before the first."""
        spent = np.array([rise[axis] for rise in self.rises])
        rewards = np.array([-math.inf, *(rise[2] for rise in self.rises)])
        return rewards[np.searchsorted(spent, limits, side="right")]


def judged(vae: Any, reward: Reward, prompt: str) -> Callable[[Run], Callable[[Tensor], Tensor]]:
    """`evaluate` of a search as the node makes it: decode, then score what `prompt` asks for."""
    return lambda run: lambda x0: score(reward, host.decode(vae, run.latents_out(x0)), prompt)


def searched(
    task: Task, config: Config, budget: Budget, seed: int, evaluate: Callable[[Run], Callable[[Tensor], Tensor]],
    transition: Transition | None = None, keep: int = 4,
) -> tuple[Curve, State]:  # fmt: skip
    """One search through the headless host, as a node runs it."""
    model, clip, _ = host.embedded(task.kind)
    negative = None if task.cfg == 1 else clip.encode("")
    guider = host.cfg_guider(model, clip.encode(task.prompt), negative, task.cfg)
    empty = torch.zeros(task.batch, 16, 8, 8)
    rises: list[tuple[int, float, float]] = []
    found: list[State] = []

    def rise(state: State) -> None:
        if not rises or state.best.reward > rises[-1][2]:
            rises.append((state.ledger.calls, state.ledger.seconds, state.best.reward))

    class Searching(Method):
        """The search, inside one run of the guider."""

        searches = True

        def sample(self, run: Run) -> Tensor:
            """The best."""
            result = search(
                run, config, budget, evaluate(run), seed=seed, transition=transition, callback=rise, keep=keep
            )
            found.append(result.state)
            return result.best.latent.unsqueeze(0)

    sampler, sigmas = host.method_sampler(Searching()), simple(model.schedule, task.steps)
    host.sample(guider, sampler, sigmas, {"samples": empty}, seed, empty)
    ledger = found[0].ledger
    finite = [r for r in rises if math.isfinite(r[2])]
    return Curve(finite, ledger.calls, ledger.rewards, ledger.seconds), found[0]


def judge(boldness: float) -> Reward:
    """The embedded judge."""
    return judge_reward(host.hold, boldness)


class Kept:
    """Results in a folder by what they are results of, so that a run that was killed goes on; None keeps nothing."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def __call__(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, in JSON's types; from the file where it has been made before."""
        if self.folder is None:
            return make()
        path = self.folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}.json"
        if not path.is_file():
            write_json(path, {"of": repr(key), "found": make()})
        return json.loads(path.read_text(encoding="utf-8"))["found"]

    def curve(self, key: Any, make: Callable[[], Curve]) -> Curve:
        """The same for a curve."""
        found = self(key, lambda: asdict(make()))
        return Curve(**{**found, "rises": [(int(c), s, r) for c, s, r in found["rises"]]})


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean of independent values (N,), by Student's t."""
    from scipy.stats import t

    reach = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - reach), float(values.mean() + reach)


def bootstrap(count: int, statistic: Callable[[np.ndarray], float], draws: int = 2000) -> tuple[float, float]:
    """95 % interval of statistic(indices (count,)) over resampled items."""
    rng = np.random.default_rng(0)
    found = [statistic(rng.integers(count, size=count)) for _ in range(draws)]
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def at_most(value: float, looked: float, target: float | None, bounds: tuple[float, float] | None = None) -> Figure:
    """A share that was looked for up to `looked`: where it is above, the figure says so."""
    return Figure(min(value, looked), "" if value <= looked else "or more", target=target, interval=bounds)
