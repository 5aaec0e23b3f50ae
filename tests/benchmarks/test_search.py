"""The benchmark of search: its statistics on known curves, its instruments on known trees, and what it writes."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from retort.benchmarks import search, search_classes, search_overhead, searching
from retort.benchmarks.searching import Curve, Kept
from retort.models.reward import wanted
from retort.sampling.accounts import Candidate
from retort.sampling.particles import BestOfConfig
from retort.sampling.tree import ROOT, TreeConfig


def test_a_curve_is_the_best_within_a_limit():
    curve = Curve([(10, 1.0, -3.0), (30, 2.5, -1.0)], 40, 4, 3.0)
    assert curve.best([9, 10, 29, 30, 99]).tolist() == [-math.inf, -3, -3, -1, -1]
    assert curve.best([0.5, 2.0, 3.0], axis=1).tolist() == [-math.inf, -3, -1]


def test_the_share_is_where_the_mean_curve_arrives():
    def curves(rises, calls, seconds):
        return [[Curve(some, calls, 1, seconds)] for some in rises]

    found = search.Measured(
        {
            "best-of-N": curves([[(100, 9.0, -1.0)], [(50, 1.0, -3.0)]], 100, 10.0),
            "DTS*": curves([[(4, 1.0, -4.0), (20, 4.0, 0.0)], [(8, 2.0, -3.5)]], 40, 5.0),
            "FK": curves([[(4, 1.0, -4.0)], [(8, 2.0, -3.5)]], 40, 5.0),
        },
        1,
    )
    calls, seconds = found.share("DTS*", 0), found.share("DTS*", 1)
    assert calls.value == pytest.approx(0.2, abs=1e-3) and seconds.value == pytest.approx(0.4, abs=2e-3)
    assert (calls.target, seconds.target) == (1 / 5, 1 / 4)
    # Of the second prompt alone the goal is not reached within the 40 calls.
    assert calls.interval[1] == pytest.approx(0.4)
    missed = found.share("FK", 0)
    assert (missed.value, missed.unit, missed.target) == (0.4, "or more", None)
    assert found.best("DTS*", 10).tolist() == [-4.0, -3.5]


def test_prompts_differ_and_name_what_the_judge_can_see_but_no_stroke():
    chosen = search.prompts(40)
    assert len(set(chosen)) == 40 and chosen[:8] == search.prompts(8)
    assert all(set(wanted(prompt)) == {"digit", "ink", "paper"} for prompt in chosen)
    assert not any("bold" in prompt or "thin" in prompt for prompt in chosen)
    assert not set(chosen) & set(islice(search.drawn(search.TUNED_ON), search.TRIED))


def test_what_is_kept_is_not_made_again(tmp_path):
    kept, made = Kept(tmp_path), []

    def make():
        made.append(1)
        return Curve([(1, 0.5, -2.0)], 1, 1, 0.5)

    first = kept.curve(("a", 1), make)
    assert kept.curve(("a", 1), make) == first == make() and len(made) == 2
    kept.curve(("a", 2), make)
    Kept(None).curve(("a", 1), make)
    assert len(made) == 4


def test_intervals():
    low, high = searching.interval(np.array([1.0, 2.0, 3.0]))
    assert (low, high) == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-4)
    values = np.arange(100.0)
    low, high = searching.bootstrap(100, lambda items: values[items].mean())
    assert 43 < low < 45 and 54 < high < 56


def test_calls_to_a_distance_are_read_off_in_logarithms():
    assert search_classes.needed([100, 400], [8.0, 4.0], 6.0) == pytest.approx(200)
    assert search_classes.needed([100, 400], [5.0, 4.0], 6.0) == 100
    assert search_classes.needed([100, 400], [8.0, 7.0], 6.0) == math.inf


def test_best_of_n_is_resampled_by_importance():
    state = BestOfConfig().fresh({"sigmas": [1.0, 0.0]}, keep=3)
    rewards = [math.log(0.1), math.log(0.6), math.log(0.3)]
    state.best.found = [Candidate(torch.full((1,), float(i)), r, i, 1) for i, r in enumerate(rewards)][::-1]
    drawn = search_classes.resampled(state, 20_000, 0).flatten().int()
    assert (torch.bincount(drawn) / 20_000).tolist() == pytest.approx([0.1, 0.6, 0.3], abs=0.015)


@pytest.mark.parametrize("selection", ["uniform", "uct"])
def test_the_large_tree_is_one_that_goes_on_below_its_root(selection):
    tree = search_overhead.large(TreeConfig(selection=selection, leaves=16), 2_000)
    deep = len(tree.stops)
    assert tree.size == 1 + 2_000 // deep * deep
    leaves, drawn = len(tree.leaves), tree.drawn
    tree = search_overhead.grown(tree.config, 32, (1, 1, 1), tree)
    assert len(tree.leaves) >= leaves + 32 and tree.drawn >= drawn + 32
    below = tree.parent[tree.number >= drawn] != ROOT
    assert below.mean() > 0.8


def test_memory_is_that_of_the_latents():
    assert 0.9 < search_overhead.memory(20).value < 1.3


def test_the_figures_are_written(monkeypatch, tmp_path):
    def started(command, **_):
        return type("Done", (), {"returncode": 0, "stdout": json.dumps({"ours": [1.0] * 5, "core": [1.0] * 5})})

    monkeypatch.setattr(search, "QUICK", search.Size(prompts=2, seeds=1, n=24, budgets=(8,), steps=4))
    monkeypatch.setattr(search_classes, "QUICK", search_classes.Size((4,), (32, 64), samples=24))
    monkeypatch.setattr(search_classes, "TASK", replace(search_classes.TASK, steps=4, batch=8))
    monkeypatch.setattr(search_classes, "REFERENCE", 96)
    monkeypatch.setattr(search_overhead, "TASK", replace(search_overhead.TASK, steps=4))
    monkeypatch.setattr(search_overhead, "NODES", 2_000)
    monkeypatch.setattr(search_overhead, "ROUNDS", 1)
    monkeypatch.setattr(search_overhead, "LEAVES", 20)
    monkeypatch.setattr(search_overhead.subprocess, "run", started)
    monkeypatch.setitem(os.environ, "COMFYUI_PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["search", "--quick", "--json", str(tmp_path / "f.json"), "--work", str(tmp_path)])
    search.main()
    figures = json.loads((tmp_path / "f.json").read_text())["figures"]
    shares = {name: f for name, f in figures.items() if "DTS*'s share" in name}
    assert sorted(f["target"] for f in shares.values()) == [0.2, 0.25]
    rows = [f["value"] for name, f in figures.items() if "32 calls" in name and "mean best reward" in name]
    assert len(rows) == 7 and all(value < 0 for value in rows)
    assert sum("Fréchet distance" in name for name in figures) == 2 + 6 * 2
    assert figures["in ComfyUI, DTS*: time per call over core KSampler's at the same batch"]["met"] is True
