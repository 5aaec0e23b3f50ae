"""The state of a run in a file: everything is in it, and what is damaged or a stranger's is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from two_players import same

from retort.trainers import state


def test_state_holds_everything(make):
    first = make("a", ema=0.9)
    first.train()
    again = make("a", ema=0.9)
    again.prepare()
    assert again.resume() and again.done == 12
    for name, runner in first.runners.items():
        same(runner.weights, again.runners[name].weights)
        same(
            state.optimiser_tensors(runner.optimiser, list(runner.weights)),
            state.optimiser_tensors(again.runners[name].optimiser, list(again.runners[name].weights)),
        )
    same(first.average, again.average)
    assert torch.equal(first.objective.level, again.objective.level) and first.objective.level.item() != 0


def test_a_damaged_state_is_refused_whole(make):
    trainer = make("run")
    trainer.train()
    trainer.state_file.write_bytes(trainer.state_file.read_bytes()[:200])
    with pytest.raises(ValueError, match="cannot be read"):
        make("run").train()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config", None), ("config", "[]"), ("config", "{"), ("counters", None), ("counters", "7"), ("counters", "{}"),
        ("counters", '{"done": -1, "position": 0}'), ("counters", '{"done": 1e99, "position": 0}'),
    ],
)  # fmt: skip
def test_a_strangers_state_is_refused(make, name, text):
    trainer = make("run", steps=1)
    trainer.train()
    with safe_open(trainer.state_file, "pt") as handle:
        notes, flat = handle.metadata(), {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    notes = {k: v for k, v in {**notes, name: text}.items() if v is not None}
    save_file(flat, trainer.state_file, notes)
    with pytest.raises(ValueError, match=r"state\.safetensors is damaged.*another name"):
        make("run", steps=1).train()


def test_the_count_of_steps_is_restored_beside_its_weight():
    weight = torch.nn.Parameter(torch.zeros(2, device="meta"))
    optimiser = torch.optim.AdamW([weight])
    saved = {"w|step": torch.tensor(3.0), "w|exp_avg": torch.zeros(2), "w|exp_avg_sq": torch.zeros(2)}
    state.restore_optimiser(optimiser, ["w"], saved)
    assert {v.device.type for v in optimiser.state[weight].values()} == {"meta"}


def test_an_optimiser_of_other_shapes_is_refused():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimiser = torch.optim.AdamW([weight])
    saved = {"w|step": torch.tensor(3.0), "w|exp_avg": torch.zeros(3), "w|exp_avg_sq": torch.zeros(3)}
    with pytest.raises(ValueError, match="exp_avg of w has another shape"):
        state.restore_optimiser(optimiser, ["w"], saved)
    with pytest.raises(ValueError, match="belongs to other layers, such as v"):
        state.restore_optimiser(optimiser, ["w"], {"v|step": torch.tensor(3.0)})


def test_a_run_from_before_a_setting_goes_on_with_its_default(make):
    """A state whose settings lack one that has its default now is continued; another value is refused."""
    make("run", steps=1).train()
    path = make("run").state_file
    with safe_open(path, "pt") as handle:
        notes, flat = handle.metadata(), {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    config = json.loads(notes["config"])
    assert config["training"].pop("sound_weight") == 1.0
    save_file(flat, path, {**notes, "config": json.dumps(config)})
    with pytest.raises(ValueError, match="sound_weight: 1.0 -> 0.5"):
        make("run", steps=2, sound_weight=0.5).train()
    again = make("run", steps=2)
    again.train()
    assert again.done == 2
