"""How well preferences are learnt: a taste from 500 labelled pairs, or from a reward, by every method on both twins.

`python -m retort.benchmarks.preference [--quick] [--json FILE] [--work DIR] [--parts ...] [--kinds ...] [--runs ...]`.
What is taught, and how it is judged, is in `preference_runs`. Parts: `taught` (win rate, prompts, variety, steps),
`inversion` (what SmPO's loss measures, `preference_inversion`) and `memory` (`preference_memory`). --work keeps pairs,
trainings and pictures' scores, so that a run that was stopped goes on. --quick: three methods on the flow twin.

A tuned picture wins when it scores higher than the base's from the same noise; intervals resample the held-out prompts.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..models import evaluate
from ..models.twins import KINDS
from ..rewards.comparison import compare
from . import preference_inversion, preference_memory
from . import preference_runs as runs
from .preference_runs import Run
from .report import Figure, Report, arguments, finish
from .searching import Kept, bootstrap

WIN, WIN_TURNED, MAY_FALL = 0.9, 0.8, 0.02


@dataclass(frozen=True)
class Size:
    """per_prompt: pictures of each held-out prompt; named: prompts that name everything, for obedience."""

    per_prompt: int
    named: int


FULL, QUICK = Size(8, 128), Size(2, 32)
FIRST = 1000  # seed of a prompt's first picture; the settings were chosen on others
BESIDE = {"dpo": (30, 75), "smpo": (30,), "align_prop": (30,)}  # steps after which a run is looked at besides its end
QUICK_RUNS = ("dpo", "smpo", "mapo")


@dataclass(frozen=True)
class Looked:
    """Of one model: scores and whether digit and paper are right (prompts x seeds), shares, and distances."""

    scores: list[list[float]]
    right: list[list[bool]]
    bold: float
    warm: float
    named: float
    frechet: float
    variety: float

    @property
    def prompt(self) -> float:
        """Share of pictures whose digit and paper are the prompt's."""
        return float(np.mean(self.right))


def look(kind: str, lora: Path | None, size: Size) -> dict[str, Any]:
    """A `Looked`, in JSON's types."""
    words = [prompt for prompt in runs.prompts()[1] for _ in range(size.per_prompt)]
    seeds = list(range(FIRST, FIRST + size.per_prompt)) * len(runs.prompts()[1])
    found = runs.judged(runs.latents(kind, lora, words, seeds), words)
    asked = runs.wanted(words)
    right = (found["digit"] == asked[:, 0]) & (found["paper"] == asked[:, 1])
    captions, values = evaluate.requests(size.named, runs.SEED)
    image = runs.judged(runs.latents(kind, lora, captions, list(range(size.named))), captions)
    named = torch.stack([image["digit"], image["ink"], image["paper"]], 1) == values[:, :3]
    return {
        "scores": found["score"].view(-1, size.per_prompt).tolist(),
        "right": right.view(-1, size.per_prompt).tolist(),
        "bold": float(found["bold"].float().mean()),
        "warm": float(found["warm"].float().mean()),
        "named": float(named.all(1).float().mean()),
        "frechet": runs.frechet(found["features"]),
        "variety": runs.variety(found["features"], size.per_prompt),
    }


def win_rate(ours: Looked, base: Looked, target: float | None) -> Figure:
    """Share of the decided pairs that are won, ties left out; its interval over resampled prompts."""
    mine, theirs = np.array(ours.scores), np.array(base.scores)

    def share(rows: np.ndarray) -> float:
        return compare(mine[rows].ravel().tolist(), theirs[rows].ravel().tolist()).share

    everything = np.arange(len(mine))
    return Figure(share(everything), target=target, better="higher", interval=bootstrap(len(mine), share, 500))


def tabulate(report: Report, name: str, run: Run, ours: Looked, base: Looked) -> None:
    """What is said of a trained model against its base; targets only where the training ends (a name without steps)."""
    ends = "steps" not in name
    target = (WIN_TURNED if run.turned else WIN) if ends else None
    report.figures |= {
        f"{name}: win rate": win_rate(ours, base, target),
        f"{name}: prompt right": Figure(ours.prompt, target=base.prompt - MAY_FALL if ends else None, better="higher"),
        **shares(name, ours),
        f"{name}: variety over the base's": Figure(ours.variety / base.variety, better="higher"),
    }


def shares(name: str, found: Looked) -> dict[str, Figure]:
    """What needs no comparison."""
    return {
        f"{name}: bold": Figure(found.bold, better="higher"),
        f"{name}: warm ink": Figure(found.warm, better="higher"),
        f"{name}: everything named, right": Figure(found.named, better="higher"),
        f"{name}: Fréchet distance to bold, warm digits": Figure(found.frechet),
    }


def taught(report: Report, options: argparse.Namespace, work: Path) -> None:
    """Every method's pictures against the base's, and how soon SmPO has DPO's win rate."""
    size, kept = (QUICK if options.quick else FULL), Kept(work / "looked")

    def looked(kind: str, lora: Path | None, config: Any) -> Looked:
        return Looked(**kept((kind, config, size), lambda: look(kind, lora, size)))

    for kind in options.kinds:
        base = looked(kind, None, None)
        report.figures[f"{kind} base: prompt right"] = Figure(base.prompt, better="higher")
        report.figures |= shares(f"{kind} base", base)
        for method in options.runs:
            run = replace(runs.RUNS[method], kind=kind)
            if kind == "eps" and run.method == "flow_grpo":
                continue
            folder, steps = runs.train(f"{kind} {method}", run, work), run.config()["training"]["steps"]
            for at in sorted({*BESIDE.get(method, ()), steps}):
                found = looked(kind, runs.checkpoint(folder, at), (run, at))
                tabulate(report, f"{kind} {method}" + ("" if at == steps else f", {at} steps"), run, found, base)
            report.figures[f"{kind} {method}: training steps"] = Figure(steps)
            report.figures[f"{kind} {method}: training on one thread"] = Figure(runs.seconds(folder) / 60, "min")
        if {"dpo", "smpo"} <= set(options.runs):
            half(report, kind)


def half(report: Report, kind: str) -> None:
    """SmPO at its end against DPO at its own, which is twice as many steps."""
    ours, theirs = (report.figures[f"{kind} {method}: win rate"] for method in ("smpo", "dpo"))
    spent = [report.figures[f"{kind} {method}: training steps"].value for method in ("smpo", "dpo")]
    name = f"{kind}: win rate of smpo in {spent[0] / spent[1]:g} of dpo's steps, dpo's at its end"
    report.figures[name] = replace(ours, target=theirs.value)


PARTS = {
    "taught": taught,
    "inversion": preference_inversion.measure,
    "memory": preference_memory.measure,
}


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep pairs, trainings and scores here")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS), help="measure these parts alone")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, help="these twins alone")
    parser.add_argument("--runs", nargs="*", choices=runs.RUNS, help="these methods alone")
    options = parser.parse_args()
    options.kinds = options.kinds or (("flow",) if options.quick else KINDS)
    options.runs = options.runs or (QUICK_RUNS if options.quick else tuple(runs.RUNS))
    report = Report("preference")
    with tempfile.TemporaryDirectory() as passing:
        for part in options.parts:
            PARTS[part](report, options, options.work or Path(passing))
    finish(report, options)


if __name__ == "__main__":
    main()
