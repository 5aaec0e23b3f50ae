"""The training loop: one step at a time, everything saved, nothing lost. It knows no method and no host."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.atomic import locked, write_json, write_tensors
from ..files.folder import Inside, inside
from ..sampling.accounts import seed_of
from . import checkpointing, memory, offload, pairs, previews, slow, state
from .accumulation import Accumulation, square
from .config import NONE, RunConfig, TrainingConfig
from .data import Data
from .dataset import refuse_missing
from .denoiser import Denoiser
from .export import stored
from .host_inputs import HostInputs
from .objectives.parts.contract import Batch, Loss, Objective, swapped
from .objectives.parts.registry import METHODS
from .offload import Outcome
from .order import Order
from .origin import recognise
from .planning import Forecast, Truth
from .players import Runner
from .processes import Alone, Reducer
from .seeded import seeded
from .streaming import Ring
from .watch import METRICS, Metrics, Silent, Watcher, checkpoints, columns_of, save_sheet

STATE = "state.safetensors"
CONFIG = "config.json"
STUDENT = "student.json"  # the levels at which a few-step student is called, from a run's beginning on
SHEET = "previews.json"  # what the previews' contact sheets hold
PREPARED = 64  # samples, at most, that an objective sees before its first step


class Stopped(Exception):
    """The run was asked to stop; its state is saved."""


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message says why, what to change, and where the last good state is."""


def out_of_memory(error: BaseException, settings: TrainingConfig) -> TrainingFailed:
    """What to tell where memory ended and no more room could be made."""
    return TrainingFailed(f"memory ran out ({str(error)[:200]}): {memory.advice(settings)}")


class Trainer:
    """A run: `train()` does all its steps or raises with everything saved.

    denoiser: with the adapters that the objective's players name. folder: the run's own, where state, metrics and
    previews lie; a state found there is continued (ValueError when its settings differ). decode: latents in the
    network's scale to pictures (B, H, W, 3), for previews. origin: what the
    run is started on (`trainers.origin`); a run that was started on something else is not continued. forecast: of its
    memory, which the first step corrects by what `truth` measured,
    made before the network was placed. `done` counts steps, `begun` is where this attempt began.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        objective: Objective,
        data: Data,
        config: RunConfig,
        folder: Path | Inside,
        watcher: Watcher | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        reducer: Reducer | None = None,
        origin: Mapping[str, Any] | None = None,
        forecast: Forecast | None = None,
        truth: Truth | None = None,
    ):
        self.denoiser, self.objective, self.data, self.config = denoiser, objective, data, config
        self.files = inside(folder)  # no link in it is followed
        self.folder = self.files.path
        self.watcher: Watcher = watcher or Silent()
        self.decode = decode
        self.reducer: Reducer = reducer or Alone()
        self.origin, self.forecast = origin, forecast
        self.truth = truth or Truth(denoiser.device)
        self.settings: TrainingConfig = config.training
        self.done = self.begun = self.position = 0
        self.accumulation = Accumulation(self.settings)
        self.order = Order(denoiser, data, self.settings, self.reducer)
        self.seconds = 0.0
        self.notes: Callable[[int], Mapping[str, str]] = lambda done: {}  # of a checkpoint after so many steps
        self._moving = False  # true while some players have moved and others have not
        self.runners: dict[str, Runner] = {}
        self.host_state = self.host_inputs = False  # against little memory; set before the run, they change no number
        self.took: deque[float] = deque(maxlen=20)  # seconds of steps in which the student moved, not of the first
        self._check_data()

    def _check_data(self) -> None:
        if self.data.parts and not self.objective.of_parts:
            able = ", ".join(name for name, method in METHODS.items() if method.objective.of_parts)
            raise ValueError(
                f"{self.objective.name} learns from latents of one tensor, and these hold several (video with sound): "
                f"choose one of {able}, or connect the video's latents alone"
            )
        refuse_missing(
            self.objective.name,
            self.objective.without_images,
            images=self.objective.needs_latents and self.data.latents is None,
            empty=(self.objective.needs_uncond or self.settings.prompt_dropout > 0) and self.data.uncond is None,
        )
        size = self.settings.batch_size * self.settings.accumulation
        if size < self.reducer.world:
            raise ValueError(
                f"a step of {size} samples (batch_size x accumulation) cannot be shared by {self.reducer.world} "
                "processes; raise accumulation"
            )
        if self.settings.noise_scale_target and self.settings.accumulation % self.reducer.world:
            raise ValueError(
                f"noise_scale_target compares micro-batches of equal size, and accumulation "
                f"{self.settings.accumulation} cannot be shared equally by {self.reducer.world} processes: make it a "
                f"multiple of {self.reducer.world}"
            )

    # ---- set-up ----------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Everything before the first step but what is on disk: checkpoints, teacher pairs, heads, optimisers."""
        if self.settings.gradient_checkpointing and not checkpointing.enabled(self.denoiser.network):
            checkpointing.enable(self.denoiser.network)
        first = self.data.batch(self.denoiser, [0], [0], self.settings.seed, 0, 0.0)
        self.denoiser.rehearse(first.shape, first.cond)
        if self.objective.pairs and not self.data.pairs:
            if self.reducer.rank:  # they are made by the first process, and read by the others
                self.reducer.any(False)
            self.data.pairs = pairs.make(
                self.objective, self.denoiser, self.data, self.files, self.settings.seed, self.settings.batch_size,
                self.watcher, {"objective": self.config.to_json()["objective"], "origin": self.origin,
                               "seed": self.settings.seed, "batch_size": self.settings.batch_size},
            )  # fmt: skip
            if not self.reducer.rank:
                self.reducer.any(False)
        # The same samples on every process and after every resume: heads and means are made from them. One at a time,
        # since sizes and lengths of prompts differ.
        self.objective.prepare(self._first_samples())
        # Gradients that are compared, or added up between processes, have to be at hand.
        in_host = self.host_state and self.reducer.world == 1 and not self.accumulation.grows
        self.runners = {
            name: Runner.of(name, player, self.denoiser, self.settings, in_host)
            for name, player in self.objective.players.items()
        }
        self.denoiser.host_inputs = HostInputs(self.denoiser.device) if self.host_inputs else None
        student = self.runners["student"]
        self.average = {k: w.detach().clone() for k, w in student.weights.items()} if self.settings.ema else {}

    def _first_samples(self) -> Iterator[Batch]:
        for i in range(min(PREPARED, len(self.data))):
            self.watcher.check()
            yield self.data.batch(self.denoiser, [i], [i], self.settings.seed, 0, 0.0)

    # ---- state -----------------------------------------------------------------------------------

    @property
    def state_file(self) -> Path:
        """Where the run's state lies."""
        return (self.files / STATE).path

    def save(self) -> None:
        """Write the whole state, and the LoRA so far as a checkpoint."""
        if self.reducer.rank:
            return
        groups: dict[str, Mapping[str, Tensor]] = {"average": self.average, "buffers": self.objective.buffers()}
        for runner in self.runners.values():
            groups |= runner.saved()
        groups["order"] = self.order.saved()
        counters = {
            "done": self.done, "position": self.position, "seconds": self.seconds,
            "accumulation": self.accumulation.saved(),
        }  # fmt: skip
        state.save(self.files / STATE, self.config, groups, counters)
        if self.settings.keep:
            path = self.files / "checkpoints" / f"step_{self.done:07d}.safetensors"
            lora = {key: stored(value) for key, value in self.denoiser.to_file(self.lora()).items()}
            write_tensors(path, lora, self.notes(self.done))
            for old in checkpoints(self.files)[: -self.settings.keep]:
                old.remove()

    def resume(self) -> bool:
        """Continue the state in the folder, if there is one. ValueError when it belongs to another run."""
        if not (self.files / STATE).is_file():
            return False
        groups, counters = state.load(self.files / STATE, self.config)
        state.restore(self.objective.buffers(), groups.get("buffers", {}), "state of the objective")
        state.restore(self.average, groups.get("average", {}), "average")
        state.restore(self.order.saved(), groups.get("order", {}), "order of samples")
        for runner in self.runners.values():
            runner.restore(groups)
        self.done, self.position, self.seconds = (counters[name] for name in ("done", "position", "seconds"))
        self.accumulation.restore(counters["accumulation"])
        self.begun = self.done
        return True

    def lora(self) -> dict[str, Tensor]:
        """The student so far, the averaged one where there is an average; layers as the network names them.

        Without the layers that no gradient has reached, such as those of sound where videos have none: their update is
        exactly zero.
        """
        adapter = self.objective.players["student"].adapter
        lora = self.denoiser.adapters.lora(adapter, self.average or None)
        moved = {key.rpartition("lora_")[0] for key, up in lora.items() if "lora_B" in key and bool(up.any())}
        return {key: value for key, value in lora.items() if key.rpartition("lora_")[0] in moved} or lora

    # ---- steps -----------------------------------------------------------------------------------

    def train(self) -> dict[str, Tensor]:
        """Run all steps that are left and return the LoRA.

        Stopped when a watcher asks for it, TrainingFailed when the numbers are no longer finite or memory ends, and
        whatever a watcher's check raises; in every case the state of the last whole step is on disk.
        """
        lock = contextlib.nullcontext() if self.reducer.rank else locked(self.files)
        with lock, self._careful():
            self.reducer.any(False)  # nobody touches the folder before the first process holds it
            if not self.reducer.rank:
                for name in (STATE, CONFIG, METRICS):  # not all: others write a job's status meanwhile
                    self.files.forget_parts(name)
                for inner in ("checkpoints", "pairs", "previews"):
                    (self.files / inner).forget_parts()
                if self.origin is not None:
                    recognise(self.files, self.origin, (self.files / STATE).is_file())
            if self.settings.slow_repeats > 1:
                self.data.repeat(slow.repeats(self._scout, self.objective, self.config, self.files, self.watcher))
            self._with_room(self.prepare, graphs=False)
            going_on = self.resume()
            self._agree()
            if not going_on and not self.reducer.rank:
                write_json(self.files / CONFIG, self.config.to_json())
                if levels := self.objective.student_levels:
                    write_json(self.files / STUDENT, {"sigmas": [round(float(level), 6) for level in levels]})
            log = Metrics(self.files, self.done) if not self.reducer.rank else None
            try:
                self._run(log)
            finally:
                if log:
                    log.close()
            return self.lora()

    def _scout(self, config: RunConfig, folder: Inside, watcher: Watcher) -> Trainer:
        """A run of its own with the same network and data."""
        return Trainer(
            self.denoiser, self.objective, self.data, config, folder, watcher,
            reducer=self.reducer, origin=self.origin, forecast=self.forecast, truth=self.truth,
        )  # fmt: skip

    def _agree(self) -> None:
        """Every process starts from the first one's numbers."""
        if self.reducer.world > 1:
            mine = [w for runner in self.runners.values() for w in runner.weights.values()]
            mine += [*self.average.values(), *self.objective.buffers().values(), *self.order.saved().values()]
            if self.reducer.rank:
                torch._foreach_zero_([w.detach() for w in mine])
            self.reducer.sum(mine)
            steps = torch.tensor([float(self.done)], device=self.denoiser.device)
            self.reducer.sum([steps])
            if self.reducer.any(float(steps) != self.reducer.world * self.done):
                raise ValueError(
                    f"the processes do not all see the same state in {self.folder}: put the run's folder where every "
                    "machine finds it"
                )

    @contextlib.contextmanager
    def _careful(self) -> Iterator[None]:
        try:
            yield
        except TrainingFailed:
            raise  # of a run within this one
        except (RuntimeError, MemoryError) as error:
            if not memory.ran_out(error):
                raise
            raise out_of_memory(error, self.settings) from error
        finally:
            self.denoiser.host_inputs = None
            if self.settings.gradient_checkpointing:
                checkpointing.disable(self.denoiser.network)

    def _run(self, log: Metrics | None) -> None:
        settings, saved_at = self.settings, time.monotonic()
        saved = self.done  # before the first step there is nothing to lose
        try:
            if not self.done and settings.preview_every:
                self._preview()  # what later ones are compared with
            self.truth.begin()
            while self.done < settings.steps:
                metrics = self._with_room(self.step)
                if self.done == self.begun + 1:
                    self.forecast = offload.corrected(
                        self.forecast, self.denoiser.ring, self._spare(),
                        None if self.objective.varies else self.truth.peak, metrics["seconds"], not self.begun,
                        self.watcher.says,
                    )  # fmt: skip
                elif "student_loss" in metrics:
                    self.took.append(metrics["seconds"])
                if log:
                    log.add(self.done, metrics)
                self.watcher.step(self.done, settings.steps, metrics)
                commands = self.watcher.commands()
                stop = self.reducer.any("stop" in commands)
                every, last = settings.preview_every, self.done == settings.steps
                if "sample" in commands or (every and (last or self.done % every == 0)):
                    self._preview()
                due = settings.save_minutes and time.monotonic() - saved_at > settings.save_minutes * 60
                if "save" in commands or due or (settings.save_every and self.done % settings.save_every == 0):
                    if log:
                        log.flush()  # a kill must not leave a state that is ahead of its log
                    self.save()
                    saved, saved_at = self.done, time.monotonic()
                if stop and self.done < settings.steps:
                    raise Stopped("run it again to go on")
        finally:
            # Also on cancel and on error: the weights are those of the last whole step.
            if saved != self.done and not self._moving:
                self.save()

    def _with_room(self, work: Callable[[], Outcome], graphs: bool = True) -> Outcome:
        """Do something, with less of the memory taken where it ends meanwhile; graphs: some may wait in it."""
        alone = self._one_graph if graphs else lambda: False
        return offload.enough_room(work, self._spare, alone, self._begin_again, self.watcher.says)

    def _spare(self) -> Ring | None:
        """What can make room for a step to begin again: not where weights have moved, nor where others wait."""
        can = self.settings.gradient_checkpointing and self.settings.offload != NONE and self._repeatable
        return self.denoiser.ring if can else None

    def _one_graph(self) -> bool:
        """Let no graph wait beside another from now on; False where none waited, or a step cannot begin again."""
        waited = self.objective.graphs_wait(self.config.objective) and self.denoiser.keeps_graphs is not False
        if not (waited and self._repeatable):
            return False
        self.denoiser.keeps_graphs = False
        return True

    @property
    def _repeatable(self) -> bool:
        """Whether a step can begin again: weights have not moved, and no other process waits."""
        return not self._moving and self.reducer.world == 1

    def _begin_again(self) -> None:
        offload.forget_unused(self.denoiser.device)
        self._zero()
        if self.done > self.begun:
            self.save()
        self.truth.begin()

    def step(self) -> dict[str, float]:
        """One step, and its numbers."""
        began = time.perf_counter()
        step, settings = self.done, self.settings
        batches = self.order.batches(self.position, self.accumulation.groups, step)
        whole = settings.batch_size * settings.accumulation * self.accumulation.groups
        data_seconds = time.perf_counter() - began
        totals: dict[str, Tensor | float] = {}
        moving: dict[str, None] = {}
        squares: list[Tensor] = []
        for batch in batches:
            self.watcher.check()
            share = len(batch) / whole
            before = self.runners["student"].gradient() if self.accumulation.grows else None
            for loss in self._losses(batch, step):
                name, value, metrics = loss.player, self.order.weighted(loss, batch), loss.metrics
                with self.denoiser.adapter(self.runners[name].player.adapter), self.runners[name].turn():
                    (value * share).backward()
                moving[name] = None
                for key, number in {f"{name}_loss": value.detach(), **metrics}.items():
                    totals[key] = totals.get(key, 0.0) + share * number
                del loss, value
            if before is not None:
                squares.append(square(self.runners["student"].gradient(), before) / share**2)
        numbers = self._reduced(totals, list(moving))
        norms = {name: float(self.runners[name].clip(settings.max_grad_norm)) for name in moving}
        if not all(map(math.isfinite, (*norms.values(), *(v for k, v in numbers.items() if k.endswith("_loss"))))):
            self._zero()
            # A run that goes on keeps its settings.
            lower = f"lower learning_rate from {settings.learning_rate:g}{', under another name' if step else ''}"
            kept = f". The weights after step {step} are kept in {self.state_file}" if step else ""
            raise TrainingFailed(
                f"step {step + 1}: {lower}, since the loss or its gradient is not a finite number "
                f"({', '.join(f'{k} {v:g}' for k, v in numbers.items() if k.endswith('_loss'))}). If that does not "
                "help, set precision to fp32 (advanced), or look at what this step was trained on, counted from 1: "
                f"{', '.join(str(row + 1) for row in self.order.rows[:16])}{kept}"
            )
        if not step:
            try:
                self.objective.check_first(numbers)
            except ValueError:
                self._zero()
                raise
        rate = settings.learning_rate * settings.rate(step)
        for name in moving:
            self.runners[name].move(rate * self.runners[name].player.rate, self._begins_to_move)
        self._zero()
        self._average(step)
        self.position += self.accumulation.groups
        self.order.learn()
        self.objective.after_step(numbers, step)
        if squares and "student" in moving:
            numbers |= self.accumulation.saw(squares, norms["student"], self.reducer)
        self.done += 1
        self._moving = False
        spent = time.perf_counter() - began
        self.seconds += spent
        numbers |= {f"{name}_grad": value for name, value in norms.items()}
        numbers |= {"rate": rate, "seconds": spent, "data": data_seconds / spent}
        if (highest := self.truth.highest) is not None:
            numbers |= {"memory": float(highest), "card": float(self.truth.size)}
        return numbers

    def _begins_to_move(self) -> None:
        self._moving = True

    def _losses(self, batch: Batch, step: int) -> Iterator[Loss]:
        """The objective's losses, with the adapters' dropout drawn from the step alone."""
        if not self.config.lora.dropout:
            yield from self.objective.losses(batch, step)
            return
        seed = seed_of(self.settings.seed, step, batch.draws.indices[0], "dropout")
        with seeded(seed, self.denoiser.device):
            yield from self.objective.losses(batch, step)

    def _reduced(self, totals: dict[str, Tensor | float], moving: list[str]) -> dict[str, float]:
        """The whole batch's mean metrics as numbers, and gradients added up over the processes."""
        gradients = [w.grad for name in moving for w in self.runners[name].weights.values() if w.grad is not None]
        self.reducer.sum(gradients)
        keys = sorted(totals)
        row = torch.stack([torch.as_tensor(totals[k], dtype=torch.float32, device=self.denoiser.device) for k in keys])
        self.reducer.sum([row])
        return dict(zip(keys, row.tolist(), strict=True))

    def _zero(self) -> None:
        for runner in self.runners.values():
            runner.forget_gradients()

    @torch.no_grad()
    def _average(self, step: int) -> None:
        if self.average:
            # A short memory at first, so that the average is not dragged by the random start.
            rate = min(self.settings.ema, (step + 1) / (step + 10))
            weights = self.runners["student"].weights
            torch._foreach_lerp_(list(self.average.values()), [weights[k] for k in self.average], 1 - rate)

    # ---- previews --------------------------------------------------------------------------------

    def _preview(self) -> None:
        """A preview, or none where it does not fit: a run that does goes on without."""
        try:
            self._with_room(self.preview, graphs=False)
        except (RuntimeError, MemoryError) as error:
            if not memory.ran_out(error) or isinstance(error, TrainingFailed):
                raise
            self.watcher.says(f"memory ran out in the preview after step {self.done}, which is left out")
        else:
            return
        # By now nothing refers to the error, which held on to all that was being computed.
        offload.forget_unused(self.denoiser.device)

    def preview(self) -> None:
        """Draw the first prompts, show them, and write the contact sheet."""
        if not self.settings.previews or self.decode is None or self.reducer.rank:
            return
        with swapped(self.runners["student"].weights, self.average):
            images = previews.draw(self.denoiser, self.objective, self.data, self.settings, self.decode)
        path = self.files / "previews" / f"step_{self.done:07d}.png"
        save_sheet(images, path)
        rows = previews.rows_of(self.data, self.settings)
        frames = len(images) // len(rows)
        prompts = [self.data.prompts[i] if self.data.prompts else "" for i in rows for _ in range(frames)]
        write_json(self.files / SHEET, {"columns": columns_of(len(images)), "prompts": prompts})
        self.watcher.preview(images, self.done, path)
