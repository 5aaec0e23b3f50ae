"""What SmPO's loss measures: the same pairs with the noise that the student, the base, or nobody finds in them.

SmPO's noise is found by the student's own inversion at each step, so its loss is that of a question which moves with
the weights. Here one trained student is asked three questions about the same pairs at the same levels: noise by its own
inversion, by the base's, and fresh noise. `student` and `base` are the network's mean error of the loser less that of
the winner; the loss's argument is their difference times beta gamma / 2.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..hosts.headless import embedded, host
from ..hosts.training import add_adapters, encode
from ..models import loader
from ..trainers.methods import read_config
from ..trainers.objectives.contract import Batch, swapped
from ..trainers.objectives.preference import LOSER
from ..trainers.objectives.smpo import SmPO
from ..trainers.watch import METRICS, read_metrics
from . import preference_runs as runs
from .report import Figure, Report

PAIRS, SEED, MEANS = 128, 1, 15
FOUND = ("student", "base", "nobody")


@contextmanager
def _as_base(objective: SmPO) -> Iterator[None]:
    """Within it the student's adapter changes nothing."""
    weights = objective.denoiser.adapters.parameters("student")
    with swapped(weights, {name: torch.zeros_like(w) for name, w in weights.items() if "lora_B" in name}):
        yield


@torch.no_grad()
def asked(objective: SmPO, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """(student's, base's) error of the loser less that of the winner (B,), by who found the noise."""
    denoiser, sigma, both = objective.denoiser, objective.sigma(batch.draws), (batch.images, batch.columns[LOSER])
    noises = {"nobody": (batch.draws.normal("noise", batch.shape),) * 2}
    noises["student"] = tuple(objective.found_noise(latents, sigma, batch.cond) for latents in both)
    with _as_base(objective):
        noises["base"] = tuple(objective.found_noise(latents, sigma, batch.cond) for latents in both)
    found = {}
    for who, noise in noises.items():
        gaps = []
        for adapter in ("student", None):
            with denoiser.adapter(adapter):
                winner, loser = (
                    objective.error(one, sigma, its, batch.cond) for one, its in zip(both, noise, strict=True)
                )
            gaps.append(loser - winner)
        found[who] = (gaps[0], gaps[1])
    return found


def measure(report: Report, options: argparse.Namespace, work: Path) -> None:
    """SmPO's trained student on its own pairs."""
    for kind in options.kinds:
        run = replace(runs.RUNS["smpo"], kind=kind)
        folder = runs.train(f"{kind} smpo", run, work)
        config = read_config(run.config())
        rows = read_metrics(folder / METRICS)
        for name, part in (("first", rows[:MEANS]), ("last", rows[-MEANS:])):
            mean = sum(row["student_loss"] for row in part) / len(part)
            report.figures[f"{kind} smpo: loss, {name} {MEANS} steps"] = Figure(mean)
        with host.training_session():
            denoiser = host.trainable(embedded.load(kind)[0])
            objective = SmPO(config.objective, denoiser)
            last = loader.read_state(runs.checkpoint(folder, config.training.steps))
            add_adapters(denoiser, config, objective, last)
            data = encode(denoiser, runs.pairs(kind, work))
            rows_of = range(PAIRS)
            found = asked(objective, data.batch(denoiser, rows_of, rows_of, SEED, 0, 0.0))
            denoiser.release()
        for who in FOUND:
            student, base = found[who]
            about = f"{kind} smpo, noise found by {who}"
            report.figures[f"{about}: loser's error less winner's, student"] = Figure(float(student.mean()))
            report.figures[f"{about}: loser's error less winner's, base"] = Figure(float(base.mean()))
            right = float((student > base).float().mean())
            report.figures[f"{about}: pairs that the loss calls right"] = Figure(right, better="higher")
