"""The benchmark of preference: what it teaches, its figures on known scores, and that its parts fill a report."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("sklearn")

from retort.benchmarks import preference, preference_inversion, preference_memory
from retort.benchmarks import preference_runs as runs
from retort.benchmarks.preference import Looked
from retort.models import digits
from retort.models.reward import wanted
from retort.trainers.dataset import Dataset


def test_prompts_say_nothing_of_the_taste_and_none_is_on_both_sides():
    trained, held_out = runs.prompts()
    assert (len(trained), len(held_out)) == (160, 40) and not set(trained) & set(held_out)
    for prompt in trained + held_out:
        assert set(wanted(prompt)) == {"digit", "paper"}
        assert not any(word in prompt for word in (*digits.WEIGHTS, "red", "orange", "yellow"))


def test_warm_ink_is_the_mass_of_three_colours():
    class Fixed(torch.nn.Module):
        def forward(self, images):
            return {"ink": torch.tensor([[0.0, 0, 1, 2, 3, 0, 0, 0]]).expand(len(images), -1)}

    class Here:
        network = Fixed()

        def load(self):
            return torch.device("cpu")

    chances = torch.tensor([0.0, 0, 1, 2, 3, 0, 0, 0]).softmax(0)
    found = runs.WarmInk(Here())(torch.zeros(2, 64, 64, 3), "a one on white paper")
    assert found.tolist() == pytest.approx([float(chances[2:5].sum().log())] * 2)


def test_a_share_of_the_pairs_is_turned():
    latents = [torch.full((1, 2, 2), float(i)) for i in range(20)]
    entries = [(torch.zeros(1, 1, 1), {}) for _ in range(10)]
    data = Dataset(entries, ["a"] * 10, None, latents[:10], None, latents[10:], [1.0] * 10)
    found = runs.turned(data, 0.3)
    swapped = [bool(w.mean() > lose.mean()) for w, lose in zip(found.latents, found.losers, strict=True)]
    assert sum(swapped) == 3 and runs.turned(data, 0.0).latents == data.latents


def test_a_win_rate_leaves_ties_out():
    def looked(scores):
        return Looked(scores, [[True]], 0, 0, 0, 0, 1)

    figure = preference.win_rate(looked([[1.0, 2.0], [3.0, 0.0]]), looked([[0.0, 2.0], [1.0, 1.0]]), 0.9)
    assert figure.value == pytest.approx(2 / 3) and figure.target == 0.9 and figure.better == "higher"
    assert figure.interval[0] <= 2 / 3 <= figure.interval[1]


def test_the_figures_are_written(monkeypatch, tmp_path):
    trained, held_out = runs.prompts()
    monkeypatch.setattr(runs, "prompts", lambda: (trained[:6], held_out[:2]))
    monkeypatch.setattr(runs, "reference", lambda: torch.randn(80, 64, generator=torch.Generator().manual_seed(0)))
    for name, value in {"PAIRS": 4, "STEPS": 2}.items():
        monkeypatch.setattr(runs, name, value)
    few = {"steps": 2, "batch_size": 2, "save_every": 1, "warmup": 0}
    short = {name: replace(runs.RUNS[name], training=few) for name in ("dpo", "smpo", "dpo_turned")}
    short["spo"] = runs.Run("flow", "spo", {"steps": 3, "cfg": 1.0, "trained": 1}, {**few, "prompt_dropout": 0.0})
    monkeypatch.setattr(runs, "RUNS", short)
    monkeypatch.setattr(preference, "BESIDE", {"dpo": (1,)})
    monkeypatch.setattr(preference_inversion, "LOSSES", {})
    monkeypatch.setattr(preference, "FULL", preference.Size(2, 2))
    monkeypatch.setattr(preference_inversion, "PAIRS", 2)
    tiny = preference_memory.random_case(1, 1, 4, 4, 1)
    monkeypatch.setattr(preference_memory, "cases", lambda quick: {"tiny": replace(tiny, pairs=True)})
    monkeypatch.setattr(preference_memory, "embedded_case", lambda: tiny)
    few_paired = {name: preference_memory.PAIRED[name] for name in ("dpo", "mapo")}
    monkeypatch.setattr(preference_memory, "PAIRED", few_paired)
    monkeypatch.setattr(preference_memory, "SAMPLED", {"align_prop": preference_memory.AlignPropConfig(2, 1.0)})
    monkeypatch.setattr(preference_memory, "STEPS", 3)
    monkeypatch.setattr(preference_memory, "KEPT", (1, 2, 3))
    arguments = ["preference", "--kinds", "flow", "--json", str(tmp_path / "f.json"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr("sys.argv", arguments)
    preference.main()
    figures = json.loads((tmp_path / "f.json").read_text())["figures"]
    assert {f["target"] for name, f in figures.items() if name.endswith(": win rate") and f["target"]} == {0.8, 0.9}
    assert sum(name.endswith("prompt right") for name in figures) == 1 + len(short) + 1
    assert figures["flow dpo, 1 steps: win rate"]["target"] is None
    assert "flow smpo, noise found by base: pairs that the loss calls right" in figures
    assert 0.5 < figures["tiny, without checkpoints: dpo step over plain step"]["value"] < 2
    assert figures["AlignProp, 3 steps, checkpointed: a step more, from K 2 to 3"]["target"] == 2.0
