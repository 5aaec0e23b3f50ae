"""What search finds for what it spends: tree search beside its baselines on the embedded model; and its overhead.

`python -m retort.benchmarks.search [--quick] [--json FILE] [--work DIR] [--seeds N] [--methods NAME ...]`. Three parts:
the best reward against network calls and seconds; class-conditional sampling by a steered unconditional prior
(`search_classes`); overhead over the bare network (`search_overhead`), whose figure inside ComfyUI needs COMFYUI_PATH.
--work keeps finished searches there, so that a run that was stopped goes on.

The reward is log p(digit, ink, paper) + log p(bold) by the judge, for prompts that say nothing of boldness. Every
method has the same model, steps, batch and accounting; those that are not the target's two stop at a fifth of it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from ..hosts.headless.host import host
from ..models import digits
from ..models.twins import KINDS
from ..sampling.accounts import Budget, seed_of
from ..sampling.find import FindConfig
from ..sampling.particles import BestOfConfig, SteeringConfig, ValueConfig
from ..sampling.search import Config
from ..sampling.transition import Transition
from ..sampling.tree import DTS_STAR, PAPER_WIDENING, TreeConfig
from . import search_classes, search_overhead
from .report import Figure, Report, arguments, finish
from .searching import Curve, Kept, Task, at_most, bootstrap, interval, judge, judged, searched

REPORTED = 2026  # the seed that prompts are drawn from
TUNED_ON, TRIED = 777, 24  # and that of those, so many, that the settings were chosen on
BATCH = 8
TRANSITION = {"FIND": Transition("ode")}


@dataclass(frozen=True)
class Size:
    """How much is measured. n: of best-of-N; budgets: the N whose calls the table's rows are at, the largest last."""

    prompts: int
    seeds: int
    n: int
    budgets: tuple[int, ...]
    steps: int = 20

    def limit(self, method: str) -> int:
        """As how many samples' calls a method may spend."""
        return {"best-of-N": self.n, "DTS*": self.n // 3}.get(method, self.budgets[-1])


FULL = Size(prompts=40, seeds=3, n=256, budgets=(16, 51))
QUICK = Size(prompts=8, seeds=1, n=64, budgets=(13,))


def methods(batch: int) -> dict[str, Config]:
    """Every method, with as many particles or leaves as a forward holds. The target's two come first."""
    return {
        "best-of-N": BestOfConfig(),
        "DTS*": DTS_STAR,
        "DTS": TreeConfig(leaves=batch),
        "DTS, the paper's widening": TreeConfig(leaves=batch, **PAPER_WIDENING),
        "FK": SteeringConfig(particles=batch),
        "SVDD": ValueConfig(),
        "FIND": FindConfig(samples=batch),
    }


def drawn(seed: int) -> Iterator[str]:
    """Prompts of digit, ink and paper, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        digit = int(torch.randint(len(digits.NUMBERS), (1,), generator=generator))
        ink, paper = digits.PAIRS[int(torch.randint(len(digits.PAIRS), (1,), generator=generator))]
        yield f"a {digits.COLOURS[ink]} {digits.NUMBERS[digit]} on {digits.COLOURS[paper]} paper"


def prompts(count: int) -> list[str]:
    """Different prompts; those that the settings were chosen on are left out."""
    seen = set(islice(drawn(TUNED_ON), TRIED))
    fresh: list[str] = []
    for prompt in drawn(REPORTED):
        if len(fresh) == count:
            break
        if prompt not in seen:
            seen.add(prompt)
            fresh.append(prompt)
    return fresh


@dataclass(frozen=True)
class Measured:
    """Curves by method, [prompt][seed]; evals: network calls of one sample."""

    curves: dict[str, list[list[Curve]]]
    evals: int

    def best(self, method: str, limit: float, axis: int = 0) -> np.ndarray:
        """(prompts,): best reward within a limit, mean over the seeds."""
        return np.array([np.mean([c.best([limit], axis)[0] for c in row]) for row in self.curves[method]])

    def share(self, method: str, axis: int) -> Figure:
        """How much of best-of-N's calls (axis 0) or seconds (1) a method needs for the same mean best reward."""
        theirs, ours = self.curves["best-of-N"], self.curves[method]
        spent = np.array([[c.seconds if axis else c.calls for c in row] for row in theirs]).mean(1)
        goal = np.array([[c.rises[-1][2] for c in row] for row in theirs]).mean(1)
        last = max(c.seconds if axis else c.calls for row in ours for c in row)
        limits = np.linspace(0, last, 513)[1:]
        grown = np.array([np.mean([c.best(limits, axis) for c in row], 0) for row in ours])

        def needed(items: np.ndarray) -> float:
            there = np.flatnonzero(grown[items].mean(0) >= goal[items].mean())
            return float(limits[there[0]] / spent[items].mean()) if len(there) else math.inf

        looked = float(last / spent.mean())
        bounds = bootstrap(len(goal), lambda items: min(needed(items), looked))
        target = (1 / 4 if axis else 1 / 5) if method == "DTS*" else None
        return at_most(needed(np.arange(len(goal))), looked, target, bounds)


def measure(task: Task, size: Size, kept: Kept, only: Collection[str] = ()) -> Measured:
    """Every method on every prompt and seed, in turn; `only` these where it names any."""
    evals = size.steps * (1 if task.cfg == 1 else 2)
    vae, reward, chosen = host.embedded(task.kind)[2], judge(1.0), methods(task.batch)
    chosen = {name: config for name, config in chosen.items() if not only or name in only}
    curves: dict[str, list[list[Curve]]] = {name: [[] for _ in range(size.prompts)] for name in chosen}
    for seed in range(size.seeds):
        for row, prompt in enumerate(prompts(size.prompts)):
            own = replace(task, prompt=prompt, steps=size.steps)
            for name, config in chosen.items():
                calls = size.limit(name) * evals

                def make(own=own, name=name, config=config, calls=calls, seed=seed) -> Curve:
                    evaluate = judged(vae, reward, own.prompt)
                    run_seed = seed_of("search", own.prompt, seed)
                    return searched(own, config, Budget(calls=calls), run_seed, evaluate, TRANSITION.get(name))[0]

                curves[name][row].append(kept.curve(("reward", own, name, config, calls, seed), make))
    return Measured(curves, evals)


def tabulate(report: Report, found: Measured, size: Size, about: str) -> None:
    """Rows of mean best reward at equal calls, and the two targets."""
    for n in size.budgets:
        for name in found.curves:
            values = found.best(name, n * found.evals)
            figure = Figure(float(values.mean()), better="higher", interval=interval(values))
            report.figures[f"{about}, {n * found.evals} calls: {name}, mean best reward"] = figure
    if "best-of-N" not in found.curves:
        return
    last = found.best("best-of-N", size.n * found.evals)
    whole = f"{about}: best-of-{size.n}"
    report.figures[f"{whole} ({size.n * found.evals} calls), mean best reward"] = Figure(
        float(last.mean()), better="higher", interval=interval(last)
    )
    for name in [name for name in found.curves if name != "best-of-N"]:
        report.figures[f"{whole}'s reward: {name}'s share of its calls"] = found.share(name, 0)
        report.figures[f"{whole}'s reward: {name}'s share of its wall time"] = found.share(name, 1)


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep finished searches here")
    parser.add_argument("--seeds", type=int, metavar="N", help="so many seeds for each prompt instead of three")
    parser.add_argument("--kind", choices=KINDS, default="flow", help="which twin the first part searches")
    parser.add_argument("--cfg", type=float, default=1.0, help="its guidance; two calls a step unless it is 1")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="measure these parts alone")
    parser.add_argument("--methods", nargs="*", default=[], help="of the first part, these alone: DTS, FK and so on")
    options = parser.parse_args()
    report = Report("search")
    with torch.inference_mode():
        for part in options.parts:
            PARTS[part](report, options)
    finish(report, options)


def rewards(report: Report, options: argparse.Namespace) -> None:
    """The first part."""
    size = QUICK if options.quick else FULL
    size = replace(size, seeds=options.seeds or size.seeds)
    task = Task("", options.kind, options.cfg, batch=BATCH)
    about = f"{options.kind} twin, cfg {options.cfg:g}"
    tabulate(report, measure(task, size, Kept(options.work), options.methods), size, about)


PARTS = {"rewards": rewards, "classes": search_classes.measure, "overhead": search_overhead.measure}


if __name__ == "__main__":
    main()
