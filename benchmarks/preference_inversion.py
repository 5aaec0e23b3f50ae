"""Why SmPO's loss may rise while it learns: its size by beta, and the noise that the student finds for itself.

Two things are told apart. First, trainings with the published beta (2000, gamma 10), with and without the inversion,
beside the benchmark's own: their loss, and the share of pairs that it calls right. Second, the inversion, whose noise
moves with the weights: one trained student is asked about the same pairs at the same levels with noise by its own
inversion, by the base's, and fresh noise. `student` and `base` are the network's mean error of the loser less that of
the winner; the loss's argument is their difference times beta gamma / 2.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ..hosts.headless import embedded
from ..hosts.headless.host import host
from ..hosts.training.assembly import add_adapters, encode
from ..models import loader
from ..trainers.denoiser import Denoiser
from ..trainers.methods import read_config
from ..trainers.objectives.parts.contract import LOSER, Batch, swapped
from ..trainers.objectives.smpo import SmPO
from ..trainers.watch import METRICS, read_metrics
from . import preference_runs as runs
from .preference_runs import Run
from .report import Figure, Report

PAIRS, SEED, MEANS = 128, 1, 25
PUBLISHED = {"temperature": 4.0, "beta": 2000.0}
LOSSES = {
    "smpo_2000": Run("flow", "smpo", PUBLISHED, {"steps": 75}),
    "smpo_2000_fresh": Run("flow", "smpo", {**PUBLISHED, "inversion_steps": 0}, {"steps": 75}),
}
FOUND = ("student", "base", "nobody")


@contextmanager
def _as_base(objective: SmPO) -> Iterator[None]:
    """Within it the student's adapter changes nothing."""
    weights = cast(Denoiser, objective.denoiser).adapters.parameters("student")
    with swapped(weights, {name: torch.zeros_like(w) for name, w in weights.items() if "lora_B" in name}):
        yield


@torch.no_grad()
def asked(objective: SmPO, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """(student's, base's) error of the loser less that of the winner (B,), by who found the noise."""
    denoiser, sigma, both = objective.denoiser, objective.sigma(batch.draws), (batch.images, batch.columns[LOSER])
    noises = {"nobody": (batch.draws.normal("noise", batch.shape),) * 2}

    def found_for_both() -> tuple[Tensor, Tensor]:
        winner, loser = (objective.found_noise(latents, sigma, batch.cond) for latents in both)
        return winner, loser

    noises["student"] = found_for_both()
    with _as_base(objective):
        noises["base"] = found_for_both()
    found = {}
    for who, noise in noises.items():
        gaps = []
        for adapter in ("student", None):
            with denoiser.adapter(adapter):
                winner, loser = objective.errors(both, sigma, noise, batch.cond)
            gaps.append(loser - winner)
        found[who] = (gaps[0], gaps[1])
    return found


def measure(report: Report, options: argparse.Namespace, work: Path) -> None:
    """SmPO's trained student on its own pairs."""
    for kind in options.kinds:
        for method, plan in ({"smpo": runs.RUNS["smpo"]} | LOSSES).items():
            folder = runs.train(f"{kind} {method}", replace(plan, kind=kind), work)
            rows = read_metrics(folder / METRICS)
            for name, part in (("first", rows[:MEANS]), ("last", rows[-MEANS:])):
                for key, said in (("student_loss", "loss"), ("accuracy", "pairs called right")):
                    mean = sum(row[key] for row in part) / len(part)
                    report.figures[f"{kind} {method}: {said}, {name} {MEANS} steps"] = Figure(mean)
        run = replace(runs.RUNS["smpo"], kind=kind)
        folder, config = runs.train(f"{kind} smpo", run, work), read_config(run.config())
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
