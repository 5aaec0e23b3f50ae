"""Class-conditional sampling by a steered unconditional prior, as in Jain et al. 2025 (arXiv 2506.20701), table 1.

Prior: the flow twin on the empty prompt without guidance. Target: p(x) p(class | x), reward log p(class | x) by the
judge, lambda 1. Every method spends the same calls and then gives as many samples, with repeats where it has fewer:
DTS draws from its tree (algorithm 2), FK and best-of-N resample by their weights (for best-of-N that is self-normalised
importance sampling), SVDD repeats what it has. Measured by the Fréchet distance to drawn held-out digits of the class.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..hosts.headless.host import host
from ..models import digits, evaluate, judge, loader
from ..sampling.accounts import Budget, seed_of
from ..sampling.particles import BestOfConfig, SteeringConfig, ValueConfig
from ..sampling.search import Config
from ..sampling.tree import PAPER_WIDENING, TreeConfig
from . import search_overhead, searching
from .report import Figure, Report
from .searching import Kept, Task, at_most

TASK = Task("", batch=32)
REFERENCE = 2048  # drawings of held-out digits that distances are to
BASELINES = ("best-of-N", "FK", "SVDD")


@dataclass(frozen=True)
class Size:
    """classes: digits; budgets: calls of a baseline, ascending; samples: drawn for each distance."""

    classes: tuple[int, ...]
    budgets: tuple[int, ...]
    samples: int = 512


FULL = Size(classes=(4, 7), budgets=(1024, 2048, 5120, 10240))
QUICK = Size(classes=(4,), budgets=(320, 1280), samples=256)


def methods(calls: int) -> dict[str, Config]:
    """Lambda 1 for all. FK is one population of all the particles that these calls pay for."""
    return {
        "best-of-N": BestOfConfig(),
        "FK": SteeringConfig(particles=calls // TASK.steps, lam=1.0),
        "SVDD": ValueConfig(lam=1.0),
        "DTS": TreeConfig(leaves=TASK.batch),
        "DTS, the paper's widening": TreeConfig(leaves=TASK.batch, **PAPER_WIDENING),
        "DTS as published": TreeConfig(leaves=TASK.batch, selection="boltzmann", **PAPER_WIDENING),
    }


def features(images: Tensor) -> Tensor:
    """Judge features (N, 64) of images (N, 3, 64, 64)."""
    reader = loader.load_judge()
    return torch.cat([reader.features(part) for part in images.split(128)])


@cache
def real(digit: int, count: int, seed: int) -> Tensor:
    """Features of `count` drawings of this class's held-out digits."""
    fields, labels = digits.load("held_out")
    fields = fields[labels == digit]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(fields), (count,), generator=generator)
    parts = [digits.draw(fields[c], torch.full_like(c, digit), generator).image for c in chosen.split(128)]
    return features(torch.cat(parts))


def resampled(state: Any, count: int, seed: int) -> Tensor:
    """`count` latents of a finished search by its own rule."""
    if state.method == "tree":
        return state.latents(state.draw(count, seed))
    if state.method == "fk-steering":
        return state.draw(count, seed)
    found = sorted(state.best.found, key=lambda c: c.number)
    rewards = np.array([c.reward for c in found])
    weights = np.exp(rewards - rewards.max()) if state.method == "best-of-n" else np.ones(len(found))
    chosen = np.random.default_rng(seed).choice(len(found), count, p=weights / weights.sum())
    return torch.stack([found[i].latent for i in chosen])


def sampled(digit: int, method: str, calls: int, samples: int) -> list[float]:
    """(Fréchet distance of a method's samples after so many calls, share of them that the judge reads right)."""
    model, _, vae = host.embedded(TASK.kind)
    scored = searching.judged(vae, searching.judge(0.0), digits.NUMBERS[digit])
    seed = seed_of("classes", digit, method, calls)
    config, budget = methods(calls)[method], Budget(calls=calls)
    _, state = searching.searched(TASK, config, budget, seed, scored, keep=calls // TASK.steps + 1)
    images = host.decode(vae, model.latent.process_out(resampled(state, samples, seed))).movedim(-1, 1)
    right = torch.cat([loader.load_judge()(part)["digit"].argmax(1) == digit for part in images.split(128)])
    return [judge.frechet_distance(features(images), real(digit, REFERENCE, 360)), float(right.float().mean())]


def prior(samples: int) -> list[float]:
    """(Fréchet distance of the prior's samples to held-out digits of all classes, smallest share of a digit)."""
    model, _, vae = host.embedded(TASK.kind)
    budget = Budget(calls=samples * TASK.steps)
    anything = search_overhead.mean_of_latent
    _, state = searching.searched(TASK, BestOfConfig(), budget, 0, anything, keep=samples)
    latents = torch.stack([c.latent for c in state.best.found])
    images = host.decode(vae, model.latent.process_out(latents)).movedim(-1, 1)
    read = torch.cat([loader.load_judge()(part)["digit"].argmax(1) for part in images.split(128)])
    shares = torch.bincount(read, minlength=len(digits.NUMBERS)) / samples
    return [judge.frechet_distance(features(images), evaluate.reference(REFERENCE)), float(shares.min())]


def needed(budgets: Sequence[int], distances: Sequence[float], goal: float) -> float:
    """Calls at which a curve (log calls, distance) first comes down to `goal`; inf where it does not."""
    if distances[0] <= goal:
        return budgets[0]
    for (a, here), (b, there) in pairwise(zip(budgets, distances, strict=True)):
        if there <= goal:
            return math.exp(math.log(a) + (math.log(b) - math.log(a)) * (here - goal) / (here - there))
    return math.inf


def measure(report: Report, options: argparse.Namespace) -> None:
    """Rows of distances, means over the classes, and the target: DTS's share of the best baseline's calls."""
    size, kept = (QUICK if options.quick else FULL), Kept(options.work)
    about = f"class-conditional, digits {', '.join(map(str, size.classes))}"
    far, least = kept(("prior", TASK, size.samples), lambda: prior(size.samples))
    report.figures[f"the prior itself, {size.samples} samples: Fréchet distance to all held-out digits"] = Figure(far)
    report.figures["the prior itself: smallest share of a digit among its samples"] = Figure(least, better="higher")
    floor = [judge.frechet_distance(real(c, size.samples, size.samples), real(c, REFERENCE, 360)) for c in size.classes]
    name = f"{about}: {size.samples} held-out digits themselves, Fréchet distance"
    report.figures[name] = Figure(float(np.mean(floor)))
    rows: dict[str, list[float]] = {}
    for method in methods(size.budgets[0]):
        for calls in size.budgets:
            parts = []
            for digit in size.classes:
                key = ("classes", TASK, methods(calls)[method], digit, calls, size.samples)
                parts.append(kept(key, partial(sampled, digit, method, calls, size.samples)))
            far, right = np.mean(parts, 0)
            rows.setdefault(method, []).append(far)
            report.figures[f"{about}, {calls} calls: {method}, Fréchet distance"] = Figure(far)
            report.figures[f"{about}, {calls} calls: {method}, read right"] = Figure(right, better="higher")
    best = min(BASELINES, key=lambda name: rows[name][-1])
    share = needed(size.budgets, rows["DTS"], rows[best][-1]) / size.budgets[-1]
    name = f"{about}: DTS's share of {best}'s {size.budgets[-1]} calls for its distance"
    report.figures[name] = at_most(share, 1.0, target=1 / 5)
