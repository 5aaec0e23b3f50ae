"""Whole runs with a streamed base are those with a resident one to the bit; how many blocks are streamed, and when."""

from __future__ import annotations

from dataclasses import replace

import pytest
import streamed
import torch

from retort.sampling.path import FLOW, VE
from retort.trainers import masters, offload, planning, transfers, watch
from retort.trainers.adapters import LoraConfig
from retort.trainers.config import TrainingConfig
from retort.trainers.counted import Counted
from retort.trainers.data import Data
from retort.trainers.loop import Stopped, Trainer, TrainingFailed
from retort.trainers.methods import METHODS, read_config
from retort.trainers.objectives.parts.contract import LOSER, STRENGTH

GB = 2**30
OBJECTIVES = {
    "dmd2": {"steps": 2, "timesteps": "", "ratio": 2, "gan_weight": 0.1, "cfg": 2.0},
    "tdm": {"steps": 2, "cfg": 2.0},
    "dpo": {"beta": 1.0},
    "align_prop": {"steps": 3, "cfg": 2.0, "last": 2, "truncation": "fixed"},
    "spo": {"steps": 3, "cfg": 2.0, "candidates": 2, "trained": 2},
    "flow_grpo": {"steps": 3, "cfg": 2.0, "group": 2, "trained": 2},
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory for weights is NaN."""
    monkeypatch.setattr(masters, "SMALL", 100)
    monkeypatch.setattr(transfers.Copies, "empty", lambda self, size: torch.full((size,), 0xFF, dtype=torch.uint8))


class Interrupted(watch.Silent):
    """Ends the run after a step, or raises at the checks that it is given."""

    def __init__(self, at=None, errors=()):
        self.at, self.errors, self.checks, self.said, self.done = at, dict(errors), 0, [], 0

    def step(self, done, total, metrics):
        self.done = done

    def commands(self):
        return {"stop"} if self.done == self.at else set()

    def check(self):
        self.checks += 1
        if self.checks in self.errors:
            raise self.errors[self.checks]

    def says(self, text):
        self.said.append(text)


@pytest.fixture
def trainer(tmp_path):
    """trainer(folder, count, ...) -> a Trainer whose network streams `count` of its four blocks, None: has no ring."""

    def make(folder, count, method="flow", path=FLOW, dtype=torch.float32, watcher=None, **training):
        denoiser = streamed.StreamedDenoiser(path, dtype)
        if count is not None:
            denoiser.place(count)
        generator = torch.Generator().manual_seed(5)
        latents, losers = (list(torch.randn(6, 8, 2, 2, generator=generator)) for _ in range(2))
        conds = [{"mean": torch.tensor([0.1 * i])} for i in range(6)]
        columns = {LOSER: losers, STRENGTH: [torch.tensor(1.0)] * 6} if method == "dpo" else {}
        data = Data(conds, ["a"] * 6, {"mean": torch.zeros(1)}, latents, columns=columns)
        training = {
            "steps": 2, "batch_size": 2, "warmup": 0, "learning_rate": 0.01, "preview_every": 0, "save_minutes": 0,
            "gradient_checkpointing": True, **training,
        }  # fmt: skip
        config = read_config({
            "method": method, "objective": OBJECTIVES.get(method, {}), "training": training, "lora": {"rank": 2},
        })  # fmt: skip
        config = replace(config, lora=LoraConfig(rank=2, dropout=0.1 if method == "flow" else 0.0))
        objective = METHODS[method].objective(config.objective, denoiser)
        if METHODS[method].objective.rewards != "none":
            objective.reward = lambda x0, prompts, batch: -(x0 - 0.5).square().flatten(1).mean(1)
        return Trainer(
            denoiser, objective, data, config, tmp_path / folder, watcher, lambda x0: x0[:, :3].movedim(1, -1),
        )  # fmt: skip

    return make


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert not a[name].isnan().any() and a[name].equal(b[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_ten_steps_with_a_resume_and_previews_are_the_same(trainer, dtype):
    common = {"dtype": dtype, "steps": 10, "preview_every": 3, "previews": 1}
    expected = trainer("resident", None, **common).train()
    with pytest.raises(Stopped):
        trainer("split", 4, watcher=Interrupted(5), **common).train()
    second = trainer("split", 2, offload="2", **common)  # another number of blocks is no other run
    same(second.train(), expected)
    assert second.begun == 5
    previews = [
        (second.folder.parent / name / "previews/step_0000009.png").read_bytes() for name in ("resident", "split")
    ]
    assert previews[0] == previews[1]


@pytest.mark.parametrize(
    ("method", "path"),
    [*((name, FLOW) for name in OBJECTIVES), *((name, VE) for name in OBJECTIVES if name != "flow_grpo")],
    ids=lambda value: getattr(value, "kind", value),
)
def test_every_kind_of_pass_is_the_same(trainer, method, path):
    expected = trainer("resident", None, method, path).train()
    same(trainer("all", 4, method, path).train(), expected)
    if path is FLOW:
        same(trainer("some", 2, method, path).train(), expected)


def test_when_memory_ends_more_is_streamed_and_nothing_is_lost(trainer):
    expected = trainer("whole", None, steps=4).train()
    errors = {
        2: torch.OutOfMemoryError("here"),
        3: MemoryError("and here"),
        5: RuntimeError("MPS backend out of memory"),
    }
    watcher = Interrupted(errors=errors)
    run = trainer("short", 0, steps=4, watcher=watcher)
    same(run.train(), expected)
    assert run.denoiser.ring.count == 3
    assert watcher.said[0] == "memory ran out: 1 of 4 blocks are streamed from host memory from now on"
    errors = {check: MemoryError("again") for check in range(2, 9)}
    with pytest.raises(TrainingFailed, match="memory ran out .again"):
        trainer("never", 0, steps=4, watcher=Interrupted(errors=errors)).train()
    with pytest.raises(TrainingFailed, match="memory ran out"):
        trainer("none", 0, steps=4, offload="none", watcher=Interrupted(errors={2: MemoryError()})).train()


def test_when_memory_ends_at_the_first_preview_more_is_streamed(trainer):
    """It is drawn before step 1, where nothing has adapted to the card yet."""
    common = {"steps": 3, "preview_every": 3, "previews": 1}
    expected = trainer("whole", None, **common).train()
    watcher = Interrupted()
    run = trainer("short", 0, watcher=watcher, **common)
    decode, errors = run.decode, [torch.OutOfMemoryError("here")]

    def once(x0):
        if errors:
            raise errors.pop()
        return decode(x0)

    run.decode = once
    same(run.train(), expected)
    assert run.denoiser.ring.count == 1 and watcher.said[0].startswith("memory ran out: 1 of 4 blocks")
    drawn = [(run.folder.parent / name / "previews/step_0000000.png").read_bytes() for name in ("whole", "short")]
    assert drawn[0] == drawn[1]


def failing(work, count, error=None):
    """`work`, which fails so many times before."""
    left = [count]

    def once(*given, **named):
        if left[0]:
            left[0] -= 1
            raise error or torch.OutOfMemoryError("here")
        return work(*given, **named)

    return once


def test_when_memory_ends_at_a_preview_midway_more_is_streamed(trainer):
    common = {"steps": 4, "preview_every": 2, "previews": 1}
    expected = trainer("whole", None, **common).train()
    run = trainer("short", 0, watcher=(watcher := Interrupted()), **common)
    plain, decode = run.preview, failing(run.decode, 2)

    def preview():
        if run.done == 2:
            run.decode = decode
        plain()

    run.preview = preview
    same(run.train(), expected)
    assert run.denoiser.ring.count == 2 and [said[:15] for said in watcher.said] == ["memory ran out:"] * 2
    drawn = [(run.folder.parent / name / "previews/step_0000002.png").read_bytes() for name in ("whole", "short")]
    assert drawn[0] == drawn[1]


def test_a_preview_that_does_not_fit_is_left_out(trainer):
    """Where no more can be streamed the run goes on without, to the same weights."""
    common = {"steps": 4, "preview_every": 2, "previews": 1}
    expected = trainer("whole", None, **common).train()
    for folder, count, offloaded in (("streamed", 4, "auto"), ("resident", 0, "none")):
        run = trainer(folder, count, offload=offloaded, watcher=(watcher := Interrupted()), **common)
        run.decode = failing(run.decode, 2)
        same(run.train(), expected)
        assert watcher.said == [
            f"memory ran out in the preview after step {step}, which is left out" for step in (0, 2)
        ]
        drawn = [path.name for path in sorted((run.folder / "previews").iterdir())]
        assert drawn == ["step_0000004.png"]


@pytest.mark.parametrize("where", ["rehearse", "feature_widths"])
def test_when_memory_ends_before_the_first_step_more_is_streamed(trainer, where):
    """In the rehearsal of the blocks, and where a discriminator learns its size."""
    expected = trainer("whole", None, "dmd2").train()
    run = trainer("short", 0, "dmd2", watcher=(watcher := Interrupted()))
    run.denoiser.keeps_graphs = True
    setattr(run.denoiser, where, failing(getattr(run.denoiser, where), 1))
    same(run.train(), expected)
    # No graph waits there yet.
    assert run.denoiser.ring.count == 1 and run.denoiser.keeps_graphs and len(watcher.said) == 1


def test_when_memory_ends_for_an_idle_state_the_last_step_is_kept(trainer):
    """The first player's is fetched before anything moves: its step begins again; what has moved cannot."""
    common = {"steps": 3, "keep": 0}
    expected = trainer("whole", None, "dmd2", **common).train()
    run = trainer("short", 0, "dmd2", watcher=(watcher := Interrupted()), **common)
    run.host_state, run.denoiser.keeps_graphs = True, False
    step = run.step

    def third():
        for runner in run.runners.values():
            if run.done == 2 and run.denoiser.ring.count == 0 and next(iter(run.runners.values())) is runner:
                runner._state_to = failing(runner._state_to, 1)
        return step()

    run.step = third
    same(run.train(), expected)
    assert run.denoiser.ring.count == 1 and len(watcher.said) == 1


def test_when_memory_ends_while_the_network_comes_more_is_streamed(trainer):
    said, settings = [], TrainingConfig(gradient_checkpointing=True)
    denoiser = trainer("whole", None).denoiser
    plain = denoiser.place
    denoiser.place = failing(plain, 2)
    offload.placed(denoiser, 1, None, None, settings, said.append)
    assert denoiser.ring.count == 3 and said == [
        f"memory ran out: {count} of 4 blocks are streamed from host memory from now on" for count in (2, 3)
    ]
    for count, given, error in (
        (4, settings, MemoryError), (1, replace(settings, offload="none"), MemoryError),
        (1, replace(settings, gradient_checkpointing=False), MemoryError), (1, settings, ValueError),
    ):  # fmt: skip
        denoiser.place = failing(plain, 1, error("another"))
        with pytest.raises(error, match="another"):
            offload.placed(denoiser, count, None, None, given, said.append)


def test_blocks_for_which_memory_ends_stay_in_host_memory(trainer, monkeypatch):
    """After a first step that took less than was forecast."""
    expected = trainer("whole", None, steps=3).train()
    run = trainer("corrected", 3, steps=3, watcher=(watcher := Interrupted()))
    size = run.denoiser.ring.blocks[0].size
    run.forecast = planning.Forecast(
        Counted(5 * size, (size,) * 4, size, size, {"student backward": 9 * size}), run.settings, free=20 * size
    )
    monkeypatch.setattr(planning.Truth, "peak", property(lambda _: 5 * size))
    stream = run.denoiser.ring.stream

    def short(count):
        stream(count + 1)
        raise torch.OutOfMemoryError("here")

    run.denoiser.ring.stream = short
    same(run.train(), expected)
    assert run.denoiser.ring.count == 1 and watcher.said[-1].startswith("memory after the first step: 1 of 4 blocks")


def test_when_memory_ends_graphs_wait_no_longer_before_more_is_streamed(trainer):
    expected = trainer("whole", None, "dmd2", steps=4).train()
    for offloaded in ("auto", "none"):
        watcher = Interrupted(errors={2: MemoryError("here")})
        run = trainer(f"short_{offloaded}", 0, "dmd2", steps=4, offload=offloaded, watcher=watcher)
        run.denoiser.keeps_graphs = True
        same(run.train(), expected)
        assert run.denoiser.ring.count == 0 and run.denoiser.keeps_graphs is False
        assert watcher.said[0] == "memory ran out: one graph at a time is kept from now on"
    watcher = Interrupted(errors={2: MemoryError("here"), 3: MemoryError("and here")})
    run = trainer("shorter", 0, "dmd2", steps=4, watcher=watcher)
    same(run.train(), expected)
    assert run.denoiser.ring.count == 1 and len(watcher.said) == 2
    # A method whose graphs never wait has none to let go.
    watcher = Interrupted(errors={2: MemoryError("here")})
    trainer("flow", 0, steps=4, watcher=watcher).train()
    assert watcher.said[0].startswith("memory ran out: 1 of 4 blocks")


def test_auto_streams_what_does_not_fit(trainer, monkeypatch):
    settings = TrainingConfig(gradient_checkpointing=True)
    assert offload.blocks_to_stream(settings, 57, 12 * GB, None) == 0
    assert offload.blocks_to_stream(settings, 57, 12 * GB, 16 * GB) == 0
    assert offload.blocks_to_stream(settings, 57, 12 * GB, 8 * GB) == 57
    assert offload.blocks_to_stream(replace(settings, gradient_checkpointing=False), 57, 12 * GB, 8 * GB) == 0
    assert offload.blocks_to_stream(replace(settings, offload="none"), 57, 12 * GB, 8 * GB) == 0
    assert offload.blocks_to_stream(replace(settings, offload="20"), 57, 12 * GB, 80 * GB) == 20
    assert offload.blocks_to_stream(replace(settings, offload="99"), 57, 12 * GB, 80 * GB) == 57


def test_a_first_step_that_took_more_streams_more_and_the_run_stays_the_same(trainer, monkeypatch):
    expected = trainer("whole", None, steps=3).train()
    watcher = Interrupted()
    run = trainer("corrected", 1, steps=3, watcher=watcher)
    size = run.denoiser.ring.blocks[0].size
    counted = Counted(5 * size, (size,) * 4, size, size, {"student backward": size, "optimiser": 0})
    run.forecast = planning.Forecast(counted, run.settings, free=int(9 * size / 0.95))
    assert run.forecast.plan.streamed == 0
    # Twice as much beside the base.
    monkeypatch.setattr(planning.Truth, "peak", property(lambda _: 5 * size + 4 * size))
    same(run.train(), expected)
    assert run.denoiser.ring.count == 4 and run.forecast.factor == pytest.approx(2)
    assert any(said.startswith("memory after the first step: 4 of 4 blocks streamed") for said in watcher.said)
