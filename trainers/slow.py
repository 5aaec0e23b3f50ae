"""Slow images come more often: a short run finds those that are learnt late, and the real run begins anew with them.

USEFUL (Nguyen et al. 2024, arXiv 2404.17768, NeurIPS): train for a few epochs, split the examples of each class by the
network's outputs into two clusters, take those of the higher mean loss once more, and train from scratch on all. A
diffusion model has neither classes nor outputs that tell examples apart. Our reading, whose use for LoRAs is not
proven: an image is told by its loss after `slow_after` steps on GRID levels and noises, the same for all images; these
numbers form two clusters, by k-means; images of the higher one come `slow_repeats` times a lap. What is mislabelled or
broken is learnt late too, and would come more often.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..files.atomic import write_json
from ..files.folder import Inside
from ..files.strangers import read_json
from .config import RunConfig, TrainingConfig
from .data import Data
from .denoiser import Denoiser
from .objectives.parts.contract import Objective
from .previews import without_dropout
from .processes import Reducer
from .watch import Watcher

FOLDER, FOUND = "slow", "slow.json"
GRID = 8
MOST_BYTES = 2**26
DRAWN = -3  # the step whose draws they are; -1 and -2 are of pairs and previews


class Scout(Protocol):
    """A short run: what is asked of `loop.Trainer` here."""

    denoiser: Denoiser
    objective: Objective
    data: Data
    settings: TrainingConfig
    watcher: Watcher
    reducer: Reducer
    done: int
    begun: int

    def train(self) -> Any:
        """Goes on to the last step."""
        ...


def clusters(values: Tensor) -> Tensor:
    """(N,) which numbers are of the higher of two clusters: the split with the least squared distances (k-means, whose
    optimum is found on a line by trying every place); none where all are alike."""
    order = values.double().sort()
    ranked, n = order.values, len(values)
    below = ranked.cumsum(0)[:-1]
    left, right = torch.arange(1, n, dtype=torch.float64), torch.arange(n - 1, 0, -1, dtype=torch.float64)
    # The squares' sum is the same for every split, so the one whose means lie furthest apart has the least distances.
    between = left * right * (below / left - (ranked.sum() - below) / right).square()
    high = torch.zeros(n, dtype=torch.bool)
    if n > 1 and ranked[-1] > ranked[0]:
        high[order.indices[int(between.argmax()) + 1 :]] = True
    return high


def repeats(
    begin: Callable[[RunConfig, Inside, Watcher], Scout],
    objective: Objective,
    config: RunConfig,
    folder: Inside,
    watcher: Watcher,
) -> list[int]:
    """How often each sample of the data comes in a lap; the network is left as it was.

    begin: makes a run of its own, which lies in FOLDER of the real one's, and goes on if it was stopped. Raises what
    its training raises, ValueError for a method without a loss of each sample.
    """
    training = replace(
        config.training, steps=config.training.slow_after, slow_repeats=1, importance=0.0, ema=0.0, preview_every=0,
        keep=0, decay="constant",
    )  # fmt: skip
    scout = begin(replace(config, training=training), folder / FOLDER, Scouting(watcher))
    weights = [
        w for p in objective.players.values() for w in scout.denoiser.adapters.parameters(p.adapter).values()
    ]  # fmt: skip
    before = [w.detach().clone() for w in weights]
    scout.train()
    path = folder / FOLDER / FOUND
    if scout.done > scout.begun or not path.is_file():
        found = losses(scout)
        if not scout.reducer.rank:
            write_json(path, {"losses": found.tolist()})
    else:
        found = torch.tensor(_read(path, len(scout.data)), dtype=torch.float64)
    with torch.no_grad():
        for weight, value in zip(weights, before, strict=True):
            weight.copy_(value)
    high = clusters(found)
    often = config.training.slow_repeats
    watcher.says(f"{int(high.sum())} of {len(high)} images are learnt slowly and come {often} times a lap")
    return [often if slow else 1 for slow in high.tolist()]


def _read(path: Inside, count: int) -> list[float]:
    row = read_json(path, MOST_BYTES)
    found = row.get("losses") if isinstance(row, dict) else None
    if not isinstance(found, list) or not all(type(value) in (int, float) for value in found):
        raise ValueError(f"{path} holds no losses: delete the folder {path.parent}")
    if len(found) != count:
        raise ValueError(f"{path} is of {len(found)} images, and there are {count}: delete the folder {path.parent}")
    return found


@torch.no_grad()
def losses(trainer: Scout) -> Tensor:
    """(N,), fp64: the student's loss on each sample, the mean over GRID levels and noises that are the same for all.

    Half of them are of an even step and half of an odd one, since few_shot does not learn the same in both.
    """
    settings, reducer, denoiser = trainer.settings, trainer.reducer, trainer.denoiser
    found = torch.zeros(len(trainer.data), dtype=torch.float64)
    with without_dropout(denoiser.network):
        for row in range(reducer.rank, len(found), reducer.world):
            trainer.watcher.check()
            for step in range(2):
                places = range(step * GRID // 2, (step + 1) * GRID // 2)
                for begin in range(0, len(places), settings.batch_size):
                    part = places[begin : begin + settings.batch_size]
                    batch = trainer.data.batch(denoiser, [row] * len(part), part, settings.seed, DRAWN, 0.0)
                    for loss in trainer.objective.losses(batch, step):
                        if loss.each is None:
                            raise ValueError(
                                f"slow_repeats: {trainer.objective.name} has no loss of single samples; set it to 1"
                            )
                        found[row] += float(loss.each.sum()) / GRID
    reducer.sum([found])
    return found


class Scouting:
    """Watches the short run for whoever watches the real one."""

    def __init__(self, watcher: Watcher):
        self._watcher = watcher

    def check(self) -> None:
        """As the real run's."""
        self._watcher.check()

    def commands(self) -> set[str]:
        """To stop; there is nothing to save or to draw yet."""
        return self._watcher.commands() & {"stop"}

    def step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """As a phase, since it is no step of the real run."""
        self._watcher.phase("looking for slow images", done, total)

    def preview(self, images: Tensor, done: int, path: Inside) -> None:
        """There is none."""

    def says(self, text: str) -> None:
        """As the real run's."""
        self._watcher.says(text)

    def phase(self, name: str, done: int, total: int) -> None:
        """As the real run's."""
        self._watcher.phase(name, done, total)
