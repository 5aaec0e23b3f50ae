"""The loop on a scalar network: what it computes does not depend on how it was split, stopped or resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from two_players import PLAIN, Stop, Two, TwoConfig, same

from retort.trainers import loop, pairs, previews, state, watch
from retort.trainers.adapters import LoraConfig
from retort.trainers.loop import Stopped, TrainingFailed


def test_eight_at_once_equals_one_eight_times(make):
    same(make("a", batch_size=8).train(), make("b", batch_size=1, accumulation=8).train(), exact=False)
    same(make("c", batch_size=2, accumulation=4).train(), make("d", batch_size=8).train(), exact=False)


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("at", [1, 5, 11])
def test_stopped_and_resumed_equals_uninterrupted(make, at, ema):
    options = {"ema": ema, "prompt_dropout": 0.3, "lora": LoraConfig(rank=1, dropout=0.2)}
    whole = make("whole", **options).train()
    first = make("split", Stop(at), **options)
    with pytest.raises(Stopped, match="run it again to go on"):
        first.train()
    assert first.done == at
    second = make("split", **options)
    same(second.train(), whole)
    rows = watch.read_metrics(second.folder / watch.METRICS)
    assert [row["step"] for row in rows] == list(range(1, 13))


@pytest.mark.filterwarnings("ignore")
def test_the_8_bit_optimiser_resumes_too(make):
    pytest.importorskip("bitsandbytes")
    options = {"optimiser": "adamw8bit", "lora": LoraConfig(rank=1)}
    whole = make("whole", **options).train()
    with pytest.raises(Stopped):
        make("split", Stop(5), **options).train()
    same(make("split", **options).train(), whole)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_cancelled_in_the_middle_of_a_step_keeps_the_last_whole_one(make, error):
    whole = make("whole", accumulation=2, batch_size=2).train()
    with pytest.raises(error):
        make("split", Stop(4, error), accumulation=2, batch_size=2).train()
    second = make("split", accumulation=2, batch_size=2)
    same(second.train(), whole)


def test_layers_that_no_gradient_reaches_are_left_out(make, monkeypatch):
    """Their update is zero, so that the LoRA without them does the same: LTX-2's sound, for videos without any."""
    trainer = make("run")
    trainer.prepare()
    ups = {"a.lora_B.weight": torch.ones(2, 1), "b.lora_B.weight": torch.zeros(2, 1)}
    whole = {**{key.replace("_B", "_A"): torch.ones(1, 2) for key in ups}, **ups}
    monkeypatch.setattr(trainer.denoiser.adapters, "lora", lambda *_: whole)
    assert trainer.lora().keys() == {"a.lora_A.weight", "a.lora_B.weight"}
    ups["a.lora_B.weight"].zero_()
    assert trainer.lora().keys() == whole.keys()  # nothing has moved yet


def test_other_settings_are_refused_by_name(make):
    with pytest.raises(Stopped):
        make("run", Stop(3)).train()
    with pytest.raises(ValueError, match=r"training\.learning_rate: 0\.0001 -> 0\.001"):
        make("run", learning_rate=1e-3).train()
    with pytest.raises(ValueError, match=r"lora\.rank: 1 -> 2"):
        make("run", lora=LoraConfig(rank=2)).train()
    assert make("run", steps=14, save_every=3).train()


def test_a_decaying_rate_fixes_the_number_of_steps(make):
    with pytest.raises(Stopped):
        make("run", Stop(3), decay="cosine").train()
    with pytest.raises(ValueError, match=r"training\.steps"):
        make("run", decay="cosine", steps=14).train()


def test_nan_stops_and_keeps_the_last_good_weights(make):
    trainer = make("run", objective=TwoConfig(poison=5))
    said = r"step 6: lower learning_rate from 0\.\d+, under another name.*weights after step 5"
    with pytest.raises(TrainingFailed, match=said):
        trainer.train()
    groups, counters = state.load(trainer.state_file, trainer.config)
    assert counters["done"] == 5
    assert all(bool(torch.isfinite(v).all()) for g in groups.values() for v in g.values())


def test_out_of_memory_names_a_setting(make):
    with pytest.raises(TrainingFailed, match="gradient_checkpointing"):
        make("run", Stop(2, torch.OutOfMemoryError), gradient_checkpointing=False).train()
    for error in (MemoryError, lambda _: torch.empty(2**44)):  # what torch says on a CPU
        with pytest.raises(TrainingFailed, match="gradient_checkpointing"):
            make("run", Stop(2, error), gradient_checkpointing=False).train()


def test_two_runs_cannot_share_a_folder(make):
    first = make("run")
    with loop.locked(first.folder), pytest.raises(BlockingIOError, match="still going"):
        make("run").train()


def test_accumulation_grows_with_the_noise(make):
    trainer = make("run", batch_size=2, accumulation=2, noise_scale_target=0.05, accumulation_cap=8, steps=6)
    trainer.train()
    rows = watch.read_metrics(trainer.folder / watch.METRICS)
    counts = [row["accumulation"] for row in rows]
    assert counts == sorted(counts) and 2 < counts[-1] <= 8


def test_accumulation_that_grew_is_resumed(make):
    options = {"batch_size": 2, "accumulation": 2, "noise_scale_target": 0.05, "accumulation_cap": 8, "steps": 6}
    whole = make("whole", **options).train()
    with pytest.raises(Stopped):
        make("split", Stop(3), **options).train()
    same(make("split", **options).train(), whole)


def test_previews_are_drawn_from_fixed_noise(make):
    trainer = make("run", preview_every=6, previews=3)
    trainer.decode = lambda x: x.mean(1)[..., None].expand(-1, -1, -1, 3).sigmoid()
    trainer.train()
    drawn = sorted((trainer.folder / "previews").iterdir())
    assert [path.name for path in drawn] == ["step_0000000.png", "step_0000006.png", "step_0000012.png"]
    # The first, of the model as it came, is not drawn again by a run that goes on.
    first = drawn[0].stat().st_mtime_ns
    longer = make("run", preview_every=6, previews=3, steps=13)
    longer.decode = trainer.decode
    longer.train()
    assert drawn[0].stat().st_mtime_ns == first


def test_a_run_says_what_its_previews_sheets_hold(make):
    """As many prompts as the sheet has pictures, in its order, from the beginning again where there are few."""
    trainer = make("run", preview_every=12, previews=3)
    trainer.data.prompts = [f"prompt {i}" for i in range(len(trainer.data))]
    trainer.decode = lambda x: x.mean(1)[..., None].expand(-1, -1, -1, 3).sigmoid()
    trainer.train()
    told = json.loads((trainer.folder / loop.SHEET).read_text())
    assert told == {"columns": 3, "prompts": [f"prompt {i % len(trainer.data)}" for i in range(3)]}


def test_a_videos_preview_is_a_few_of_its_frames(make):
    trainer = make("run", previews=2)
    trainer.prepare()

    def decode(x0):
        numbers = torch.arange(9.0).repeat(len(x0)) + 100 * torch.arange(len(x0)).repeat_interleave(9)
        return numbers[:, None, None, None].expand(-1, 2, 2, 3)

    images = previews.draw(trainer.denoiser, trainer.objective, trainer.data, trainer.settings, decode)
    assert images[:, 0, 0, 0].tolist() == [0.0, 3.0, 5.0, 8.0, 100.0, 103.0, 105.0, 108.0]


def test_previews_change_nothing(make):
    plain = make("a", ema=0.9).train()
    watched = make("b", ema=0.9, preview_every=2)
    watched.decode = lambda x: x.mean(1)[..., None].expand(-1, -1, -1, 3)
    same(watched.train(), plain)


def test_checkpoints_are_kept_up_to_their_number(make):
    trainer = make("run", save_every=2, keep=2)
    trainer.train()
    found = sorted(p.name for p in (trainer.folder / "checkpoints").iterdir())
    assert found == ["step_0000010.safetensors", "step_0000012.safetensors"]


class Clock(watch.Silent):
    """Every step takes 25 seconds."""

    now = 0.0

    def step(self, done, total, metrics):
        """One on."""
        self.now += 25.0


def test_minutes_save_too(make, monkeypatch):
    clock, saves = Clock(), []
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock.now)
    trainer = make("run", clock, save_minutes=1.0, save_every=0)
    monkeypatch.setattr(trainer, "save", lambda: saves.append(trainer.done))
    trainer.train()
    assert saves == [3, 6, 9, 12]


def test_unwritable_folder(make, monkeypatch):
    trainer = make("run", save_every=2)

    def full(path, tensors, metadata):
        raise OSError(28, f"cannot write {path}: No space left on device")

    monkeypatch.setattr(state, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_killed_at_random_moments_loses_only_steps_since_the_last_save(tmp_path):
    """kill -9 at 50 moments; after each the state can be read, and at the end the run equals an uninterrupted one."""
    program = Path(__file__).with_name("killed.py")
    generator = torch.Generator().manual_seed(0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, str(program), str(tmp_path / "run"), str(tmp_path / "whole")], env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None and child.stdin is not None
    file = tmp_path / "run" / loop.STATE
    last, first_save = 0, 0.0
    for kill in range(50):
        # The program forks one run for each line, so that torch is imported once.
        child.stdin.write("go\n")
        child.stdin.flush()
        pid = int(child.stdout.readline())
        begun = time.monotonic()
        # However busy the machine: about half of the kills fall before a run's first save, half into its steps.
        while not kill and not file.exists() and time.monotonic() < begun + 60:
            time.sleep(0.002)
        first_save = first_save or time.monotonic() - begun
        time.sleep(2 * first_save * float(torch.rand((), generator=generator)))
        os.kill(pid, signal.SIGKILL)
        child.stdin.write("killed\n")
        child.stdin.flush()
        assert child.stdout.readline().strip() == "ended"
        if file.exists():
            done = state.load(file, None)[1]["done"]
            assert done >= last
            last = done
    child.stdin.write("finish\n")
    child.stdin.flush()
    assert child.stdout.readline().strip() == "equal"
    assert child.wait(60) == 0
    assert last > 0
    assert not list((tmp_path / "run").rglob("*.part"))  # what the kills left behind is cleared away


def test_what_a_kill_left_half_written_is_removed_and_a_jobs_status_is_not(make):
    trainer = make("run", save_every=2)
    parts = [trainer.folder / p for p in (".state.safetensors.9.part", "checkpoints/.a.9.part", ".status.json.9.part")]
    for part in parts:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(b"half")
    trainer.train()
    assert [part.exists() for part in parts] == [False, False, True]


class Seldom(Two):
    """The student moves every second step, as DMD2's does every fifth."""

    def losses(self, batch, step):
        for loss in super().losses(batch, step):
            if loss.player != "student" or step % 2 == 0:
                yield loss

    def after_step(self, metrics, step):
        """Nothing is kept."""


def test_accumulation_grows_where_the_student_rests(make):
    trainer = make("run", batch_size=2, accumulation=2, noise_scale_target=0.05, accumulation_cap=8, steps=6)
    trainer.objective = Seldom(PLAIN, trainer.denoiser)
    trainer.train()
    assert trainer.done == 6


def test_nothing_is_saved_before_the_first_step(make):
    """Else the advice to change a setting after memory ran out would meet a state of other settings."""
    trainer = make("run", Stop(0, torch.OutOfMemoryError))
    with pytest.raises(TrainingFailed):
        trainer.train()
    assert not trainer.state_file.exists()
    make("run", batch_size=2, steps=2).train()


def test_teacher_pairs_of_other_settings_are_made_again(make, tmp_path):
    class Maker:
        pairs, made = 12, 0

        def make_pairs(self, noise, cond, uncond):
            self.made += len(noise)
            return noise

    trainer, maker = make("run"), Maker()
    for settings, made in (({"cfg": 3}, 12), ({"cfg": 3}, 12), ({"cfg": 4}, 24)):
        pairs.make(maker, trainer.denoiser, trainer.data, tmp_path, 0, 4, watch.Silent(), settings)
        assert maker.made == made
