"""The benchmark of training: its instruments on known amounts, and the figures that it writes."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from retort.benchmarks import training, training_comfyui


def test_the_peak_is_that_of_what_is_alive_at_once():
    before = torch.ones(1000, 1000)
    with training.peak() as found:
        first = torch.ones(1000, 500)  # 2 MB
        second = first.repeat(2, 1)  # 4 MB more: 6 MB at most
        del first
        third = second[:100].clone()  # 0.2 MB
        view = before.view(-1)
    del second, third, view
    assert found.bytes == pytest.approx(6e6, rel=0.01)


def test_gradients_and_what_backward_keeps_count():
    weight = torch.randn(500, 500, requires_grad=True)
    with training.peak() as found:
        (weight.exp() ** 2).sum().backward()
    # exp's result and the square's are kept, 1 MB each; backward makes at least one more.
    assert 3e6 <= found.bytes <= 6e6


def test_turns_alternate_and_are_timed():
    order = []

    def one(name, work):
        def train(stepped):
            for _ in range(6):
                until = time.process_time() + work
                while time.process_time() < until:
                    pass
                order.append(name)
                stepped()
            order.append(f"{name} ends")

        return train

    slow, quick = training_comfyui.in_turns([one("slow", 0.01), one("quick", 0.0)], 6)
    assert order == [
        *("slow", "quick", "quick", "slow", "slow", "quick", "quick", "slow", "slow", "quick", "quick", "slow"),
        *("slow ends", "quick ends"),
    ]
    assert min(slow) > 0.009 > sum(quick) / 6

    def broken(stepped):
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="no such file"):
        training_comfyui.in_turns([broken], 1)
    with pytest.raises(RuntimeError, match="steps each"):
        training_comfyui.in_turns([lambda stepped: stepped()], 2)


def test_turns_are_timed_by_the_processor():
    def waits(stepped):
        for _ in range(2):
            time.sleep(0.05)
            stepped()

    (seconds,) = training_comfyui.in_turns([waits], 2)
    assert max(seconds) < 0.04


def test_the_figures_are_written(monkeypatch, tmp_path):
    def started(command, **_):
        measured = {"ours": [1.0] * 5, "core": [3.0] * 5, "data": [0.01] * 5}
        if "SD3" in command[-1]:  # and not streamed
            measured["bare"] = [0.9] * 5
        return SimpleNamespace(returncode=0, stdout=json.dumps(measured))

    monkeypatch.setattr(training, "embedded_case", lambda: training.random_case(1, 1, 4, 4, 1))
    monkeypatch.setattr(training.subprocess, "run", started)
    monkeypatch.setitem(os.environ, "COMFYUI_PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["training", "--quick", "--json", str(tmp_path / "figures.json")])
    training.main()
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    ratios = [f for name, f in figures.items() if "DMD2 step over plain step" in name]
    assert len(ratios) == 2 and all(1 < f["value"] < 3 and f["target"] == 1.25 for f in ratios)
    for target, which in ((2, ""), (1.5, ", streamed")):
        rates = {name: f for name, f in figures.items() if f["target"] == target}
        assert [name.split(":")[0] for name in rates] == [
            f"in ComfyUI, {name}{which}" for name in training_comfyui.NAMES
        ]
        assert all(f["value"] == 3 and f["met"] for f in rates.values())
    bare = figures["in ComfyUI, SD3, depth 2: our steps a second over a bare PEFT loop's"]
    assert (bare["value"], bare["target"], bare["better"], bare["met"]) == (0.9, 0.95, "higher", False)
    assert sum("share of time in data" in name for name in figures) == 1 + len(training_comfyui.NAMES)
