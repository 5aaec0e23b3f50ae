"""What a run is said to take before a weight of it is loaded, against what the device counts in its first step."""

from __future__ import annotations

import json

import outlines
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from retort.hosts.headless import folders
from retort.hosts.headless.host import host
from retort.hosts.training import planning
from retort.hosts.training import run as training
from retort.trainers import pace
from retort.trainers.counted import Counted
from retort.trainers.methods import read_config
from retort.trainers.planning import Forecast
from retort.trainers.watch import Silent

SMALL = {**outlines.FLUX_SMALL, "num_layers": 1, "num_single_layers": 6}
METHODS = {"flow": {}, "dmd2": {"ratio": 1}, "dpo": {}}


@pytest.mark.parametrize(
    ("method", "offload"), [("flow", "none"), ("flow", "4"), ("dmd2", "none"), ("dmd2", "7"), ("dpo", "4")]
)
def test_the_first_step_takes_what_was_forecast(second, tmp_path, monkeypatch, method, offload):
    made = []
    plain = training.Trainer.train

    def train(self):
        made.append(self)
        return plain(self)

    monkeypatch.setattr(training.Trainer, "train", train)
    settings = {
        "steps": 2, "batch_size": 2, "gradient_checkpointing": True, "preview_every": 0, "offload": offload,
        "learning_rate": 0.01, "warmup": 0,
    }  # fmt: skip
    config = {"method": method, "objective": METHODS[method], "training": settings, "lora": {"rank": 4}}
    data = outlines.dataset_of((16, 32, 32), (16, 64), 32)
    if method == "dpo":
        data.losers, data.strengths = data.latents, [1.0] * len(data.latents)
    with folders.use(folders.Folders(models=(tmp_path,), output=tmp_path / "output")):
        model = outlines.model_of(outlines.FLUX, SMALL, real=True)
        training.run(host, model, training.Request("forecast", read_config(config), data), watcher=Silent())
    (run,) = made
    assert 0.98 < run.forecast.factor < 1.02


@pytest.mark.parametrize(("method", "rank", "side"), [("dmd2", 64, 8), ("flow", 16, 32)])
def test_the_line_after_the_first_step_is_of_those_that_follow(second, tmp_path, monkeypatch, method, rank, side):
    """A run's first step makes the optimisers' states one by one; a run that goes on has them from the beginning."""
    made, peaks = [], []
    plain, step = training.Trainer.train, training.Trainer.step

    def train(self):
        made.append(self)
        return plain(self)

    def measured(self):
        self.truth.begin()
        numbers = step(self)
        if self.truth.peak:  # not the dry run's
            peaks.append(self.truth.peak)
        return numbers

    monkeypatch.setattr(training.Trainer, "train", train)
    monkeypatch.setattr(training.Trainer, "step", measured)
    data = outlines.dataset_of((16, side, side), (16, 64), 32)
    with folders.use(folders.Folders(models=(tmp_path,), output=tmp_path / "output")):
        model = outlines.model_of(outlines.FLUX, SMALL, real=True)
        for steps in (2, 4):
            settings = {
                "steps": steps, "batch_size": 1, "gradient_checkpointing": True, "preview_every": 0, "offload": "3",
                "learning_rate": 0.01, "warmup": 0,
            }  # fmt: skip
            config = {"method": method, "objective": METHODS[method], "training": settings, "lora": {"rank": rank}}
            training.run(host, model, training.Request("forecast", read_config(config), data), watcher=Silent())
    for run, last in zip(made, (peaks[1], peaks[3]), strict=True):
        assert 0.99 < run.forecast.factor < 1.01 and run.forecast.peak(3) == pytest.approx(last, rel=0.01)
    # Without a state the first step takes less.
    assert peaks[0] < 0.95 * peaks[1] and peaks[2] == pytest.approx(peaks[3], rel=0.01)


def test_a_run_ends_well_on_a_card_that_cannot_hold_its_base_and_leaves_nothing_there(second, room, tmp_path):
    """Whether the LoRA's file changes the model's output is looked at with the base streamed, as it was trained."""
    settings = {
        "steps": 2, "batch_size": 1, "gradient_checkpointing": True, "preview_every": 0, "offload": "7",
        "learning_rate": 0.01, "warmup": 0,
    }  # fmt: skip
    config = read_config({"method": "flow", "objective": {}, "training": settings, "lora": {"rank": 4}})
    data = outlines.dataset_of((16, 8, 8), (16, 64), 32)
    with folders.use(folders.Folders(models=(tmp_path,), output=tmp_path / "output")):
        model = outlines.model_of(outlines.FLUX, SMALL, real=True)
        forecast = Forecast(planning.counted(host, model, config, data, compute=torch.float32), config.training)
        left, before = int(forecast.peak(7) / 0.95) + 2**16, torch.accelerator.memory_allocated()
        assert left < forecast.counted.base
        with room(left):
            result = training.run(host, model, training.Request("large", config, data), watcher=Silent())
        assert result.path.is_file() and torch.accelerator.memory_allocated() - before < 2**16


def test_the_line_before_loading_says_seconds_and_the_next_run_knows_the_card(second, tmp_path, monkeypatch):
    settings = {
        "steps": 3, "batch_size": 1, "gradient_checkpointing": True, "preview_every": 0, "offload": "4", "warmup": 0,
        "learning_rate": 0.01,
    }  # fmt: skip
    config = read_config({"method": "flow", "training": settings, "lora": {"rank": 4}})
    data = outlines.dataset_of((16, 32, 32), (16, 64), 32)
    heard: list[str] = []

    class Hearing(Silent):
        def says(self, text):
            heard.append(text)

    with folders.use(folders.Folders(models=(tmp_path,), output=tmp_path / "output")):
        model = outlines.model_of(outlines.FLUX, SMALL, real=True)
        training.run(host, model, training.Request("first", config, data), watcher=Hearing())
        line = next(text for text in heard if text.startswith("memory: "))
        assert " s a step, transfer " in line
        ((card, (speed, bus)),) = json.loads((host.runs_folder() / planning.PACES).read_text()).items()
        assert card.startswith("second, ") and speed > 0 and bus > 0
        monkeypatch.setattr(planning, "tried", lambda *_: pytest.fail("tried again"))
        bare = Forecast(Counted(1, (1,), 1, 1, {}, {"student forward": 10}, {}), config.training)
        network, device = model.source.bare().module, torch.device("second", 0)
        known = planning.with_pace(host, bare, network, device, None)
        assert known.speed == speed and known.bus == bus
        # A file that somebody damaged says nothing.
        (host.runs_folder() / planning.PACES).write_text(json.dumps({card: [-1.0, "x"]}))
        monkeypatch.setattr(planning, "tried", lambda *_: None)
        assert planning.with_pace(host, bare, network, device, None) == bare


def test_a_card_is_tried_for_milliseconds(second):
    speed, bus = pace.tried(torch.device("second", 0), torch.float32)
    assert speed > 1e6 and bus > 1e6


def test_a_card_without_room_is_not_tried(second, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch, "ones", full)
    assert pace.tried.__wrapped__(torch.device("second", 0), torch.float32) is None
