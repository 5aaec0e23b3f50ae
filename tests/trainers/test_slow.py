"""Slow images: two clusters are the best there are, the right images are found, and the run begins anew with them."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from retort.sampling.path import VE
from retort.trainers import slow
from retort.trainers.adapters import LoraConfig
from retort.trainers.config import RunConfig, TrainingConfig
from retort.trainers.data import Data
from retort.trainers.loop import STATE, Stopped, Trainer
from retort.trainers.objectives.flow_matching import FlowMatching, FlowMatchingConfig
from retort.trainers.objectives.parts.contract import Loss
from retort.trainers.watch import Silent

SLOW = [1, 4, 9]
SETTINGS = TrainingConfig(
    steps=8, batch_size=4, warmup=0, learning_rate=0.02, preview_every=0, save_minutes=0, slow_repeats=2, slow_after=6
)


def within(values, high):
    """Squared distances from the means of both clusters."""
    parts = [values[high], values[~high]]
    return float(sum((part - part.mean()).square().sum() for part in parts if len(part)))


@pytest.mark.parametrize("count", [2, 3, 7])
def test_no_two_clusters_are_better(count):
    for seed in range(20):
        values = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).exp()
        found = slow.clusters(values)
        best = min(
            within(values, torch.tensor(mask)) for mask in itertools.product([False, True], repeat=count) if any(mask)
        )
        assert within(values, found) == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert 0 < found.sum() < count and values[found].min() > values[~found].max()


def test_where_all_are_alike_none_is_slow():
    for values in ([0.3] * 5, [1.0]):
        assert not slow.clusters(torch.tensor(values)).any()


def test_slow_modes_of_a_linear_regression_are_found():
    """The error of a mode of rate r is e^{-rt}, so its loss after t is e^{-2rt}: 0.14 and less, 0.67 and more."""
    rates = torch.tensor([1.0, 0.2, 1.3, 0.15, 2.0, 0.1])
    high = slow.clusters((-2 * rates).exp())
    assert high.tolist() == [False, True, False, True, False, True]


def test_repeated_images_come_so_often_in_each_lap():
    data = images()
    data.repeat([2 if i in SLOW else 1 for i in range(12)])
    for size in (1, 3, 5, 15):
        assert 15 % size == 0
        for lap in range(3):
            groups = [data.group(position, size, 3) for position in range(lap * 15 // size, (lap + 1) * 15 // size)]
            counts = Counter(row for group in groups for row in group)
            assert counts == {i: 2 if i in SLOW else 1 for i in range(12)}  # N + |slow| of them


def images():
    """Twelve images around 0, the teacher's mean, of which three lie far from it."""
    latents = list(torch.randn(12, 1, 2, 2, generator=torch.Generator().manual_seed(1)) * 0.3)
    for i in SLOW:
        latents[i] = latents[i] + 4.0
    row = {"mean": torch.zeros(1)}
    return Data([row] * 12, latents=latents)


@pytest.fixture
def make(affine, tmp_path):
    def build(folder, watcher=None, data=None, settings=SETTINGS, objective=FlowMatching):
        denoiser = affine(VE, (0.5, 2.0))
        config = RunConfig("flow", FlowMatchingConfig(), settings, LoraConfig(rank=1))
        made = objective(config.objective, denoiser)
        return Trainer(denoiser, made, data or images(), config, tmp_path / folder, watcher)

    return build


class Notes(Silent):
    """Keeps what it is told, and ends the run, or the looking for slow images, after a step."""

    def __init__(self, last=-1, word=""):
        self.last, self.word, self.said, self.done = last, word, [], 0

    def says(self, text):
        self.said.append(text)

    def phase(self, name, done, total):
        self.says(f"{name}: {done} of {total}")

    def step(self, done, total, metrics):
        self.done = done

    def commands(self):
        looking = self.word and self.said and self.said[-1].startswith(self.word)
        return {"stop", "save", "sample"} if looking or self.done == self.last else set()


def test_the_run_begins_anew_with_the_slow_ones_repeated(make):
    notes = Notes()
    trainer = make("run", notes)
    found = trainer.train()
    assert "3 of 12 images are learnt slowly and come 2 times a lap" in notes.said
    assert "looking for slow images: 6 of 6" in notes.said and notes.done == 8
    data = images()
    data.repeat([2 if i in SLOW else 1 for i in range(12)])
    plain = make("plain", data=data, settings=replace(SETTINGS, slow_repeats=1)).train()
    assert all(torch.equal(found[key], plain[key]) for key in plain)
    # What was looked for is the mean loss over levels and noises that are the same for all.
    losses = json.loads((trainer.folder / slow.FOLDER / slow.FOUND).read_text())["losses"]
    scout = make(f"run/{slow.FOLDER}", settings=replace(
        SETTINGS, steps=6, slow_repeats=1, keep=0, preview_every=0))  # fmt: skip
    scout.train()
    batch = scout.data.batch(scout.denoiser, [4] * 8, range(8), 0, slow.DRAWN, 0.0)
    with torch.no_grad():
        (loss,) = scout.objective.losses(batch, 0)
    assert losses[4] == pytest.approx(float(loss.value), rel=1e-5)


def test_whatever_ends_it_the_run_is_the_uninterrupted_one(make):
    whole = make("whole").train()
    for name, watcher in (("early", Notes(word="looking for slow images: 3")), ("late", Notes(last=5))):
        with pytest.raises(Stopped):
            make(name, watcher).train()
        assert (make(name).folder / STATE).exists() is (name == "late")
        notes = Notes()
        parts = make(name, notes).train()
        assert all(torch.equal(parts[key], whole[key]) for key in whole)
        again = [text for text in notes.said if "looking" in text]
        assert again == ([f"looking for slow images: {i} of 6" for i in (4, 5, 6)] if name == "early" else [])


def test_other_settings_are_refused_and_others_images_not_taken(make):
    with pytest.raises(Stopped):
        make("run", Notes(last=2)).train()
    with pytest.raises(ValueError, match=r"training\.learning_rate"):
        make("run", settings=replace(SETTINGS, learning_rate=0.5)).train()
    path = make("run").folder / slow.FOLDER / slow.FOUND
    path.write_text('{"losses": [1, 2]}')
    with pytest.raises(ValueError, match="is of 2 images, and there are 12: delete the folder"):
        make("run").train()


class Whole(FlowMatching):
    """Says nothing of single samples."""

    def losses(self, batch, step):
        for loss in super().losses(batch, step):
            yield Loss(loss.player, loss.value, loss.metrics)


def test_a_method_without_losses_of_single_samples_is_refused(make):
    with pytest.raises(ValueError, match="slow_repeats: flow_matching has no loss of single samples"):
        make("run", objective=Whole).train()
