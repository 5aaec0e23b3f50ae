"""A training run, whoever asked for it: encode, add adapters, train, write the LoRA, see that its file works.

A node calls `run` with its MODEL, the job process with the one it loaded; both get the same weights, to the bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files.atomic import check_writable, checked_name, write_json, write_new
from ...files.folder import Inside, inside
from ...files.log_file import METRICS, column
from ...files.strangers import read_json
from ...models.layouts.lora_state import alphas_of, with_alphas
from ...rewards.contract import Reward, require_differences
from ...sampling.parts import first_of
from ...sampling.presets import Preset
from ...sampling.settings import declared
from ...trainers import offload, recipes
from ...trainers.checkpointing import units
from ...trainers.config import RunConfig
from ...trainers.dataset import Dataset
from ...trainers.export import VERSION, metadata, read_lora, write_lora
from ...trainers.host_memory import given_back
from ...trainers.job import LOCK
from ...trainers.job_watch import STATUS, FileWatcher, clear_commands, has_status, holding, read_status
from ...trainers.loop import STATE, Reducer, Stopped, Trainer, TrainingFailed, out_of_memory
from ...trainers.memory import ran_out, size, weights
from ...trainers.methods import METHODS
from ...trainers.origin import origin
from ...trainers.planning import Forecast, Truth, problem
from ...trainers.state import refuse_other
from ...trainers.watch import Watcher, open_picture
from ..contract import MODEL, VAE, Host
from . import planning
from .assembly import Assembly, precision
from .conditions import shape_of
from .denoiser import HostDenoiser

RESULT = "result.json"
_log = logging.getLogger("retort.training")


@dataclass
class Request:
    """What is to be trained. name: of the LoRA and of the run's folder; start: a LoRA that the student begins as.

    recipe: that which start's file carries, see `trainers.recipes`; empty for none.
    """

    name: str
    config: RunConfig
    dataset: Dataset
    start: dict[str, Tensor] | None = None
    recipe: str = ""


def start_of(host: Host, name: str) -> tuple[dict[str, Tensor], str]:
    """(LoRA, its recipe) for a Request, from a file of the host's list. ValueError for one that cannot be read."""
    notes = host.lora_metadata(name)
    return with_alphas(host.read_lora(name), alphas_of(notes)), notes.get(recipes.KEY, "")


@dataclass
class Result:
    """lora: as core loaders read it. losses: the student's, step by step. path: the file; folder: the run's.

    stopped: what to say of a run that was stopped before its end, empty for one that has ended. renamed: why the file
    has another name than the run, and what became of an earlier one, empty where there is nothing to say.
    """

    lora: dict[str, Tensor]
    losses: list[float]
    path: Path | None
    folder: Path
    steps: int
    stopped: str = ""
    renamed: str = ""


def longer(result: Result, config: RunConfig) -> list[str]:
    """What to say of a run that has done more steps than it was asked for; nothing for another."""
    asked = config.training.steps
    if result.steps <= asked:
        return []
    done = f"it had done {result.steps} steps before, so that steps = {asked} trains nothing"
    return [f"{done}: another name begins anew"]


_handed_out: Counter[str] = Counter()  # by a run's name: LoRAs of runs that were stopped in this process


def handed_out(name: object) -> int:
    """How often a stopped run has handed out its LoRA so far; of all runs together where the name is not known."""
    return _handed_out[name] if isinstance(name, str) else sum(_handed_out.values())


def run(
    host: Host,
    model: MODEL,
    request: Request,
    *,
    watcher: Watcher,
    vae: VAE = None,
    reward: Reward | None = None,
    second: Reward | None = None,
    other: MODEL = None,
    folder: Path | None = None,
    reducer: Reducer | None = None,
    hand_out: bool = False,
) -> Result:
    """Train, and return when the LoRA is written and found to change the model's output.

    second: another reward, which AlignProp balances with the first. other: the expert that is not trained, of two that
    share the levels; previews are sampled by both. folder: the run's own (default: the host's, by name). hand_out: a
    stop gives the LoRA so far, under a name with its steps, where there is one. Raises what `trainers.loop.Trainer`
    does, ValueError for settings and data that cannot go together.
    """
    name = checked_name(request.name)
    folder = folder or host.runs_folder() / name
    inside(folder).refuse_links()
    config = request.config
    refuse_other_expert(config, other is not None)
    refuse_rewards(
        config.method, reward is not None, second is not None, vae is not None, bool(request.dataset.prompts)
    )
    for each in (reward, second):
        if each is None:
            continue
        require_differences(each)
        if METHODS[config.method].objective.rewards == "differentiable":
            _refuse_without_gradient(each, config.method)
    for needed in (folder, host.loras_folder()):
        check_writable(needed)
    forecast = planning.forecast(host, model, config, request.dataset, vae, (reward, second))
    with host.training_session():
        denoiser = host.trainable(model, precision(config))
        truth = Truth(denoiser.device)  # whose network is not there yet
        with given_back(denoiser.device, weights(denoiser.network)):
            try:
                assembly = Assembly(host, denoiser, config, vae, (reward, second), request.start, other)
                forecast = place(host, denoiser, config, forecast, watcher)
                if forecast is not None:
                    ring = denoiser.ring
                    watcher.says(f"memory: {forecast.plan if ring is None else forecast.with_streamed(ring.count)}")
                objective, data = assembly.objective, assembly.data(request.dataset)
                decode = denoiser.preview if vae is None else (lambda x0: host.decode(vae, denoiser.latents_out(x0)))
                names = [each.name for each in (reward, second) if each is not None]
                started_on = origin(denoiser.base_hash, request.dataset, request.start, " and ".join(names) or None)
                trainer = Trainer(
                    denoiser,
                    objective,
                    data,
                    config,
                    folder,
                    watcher,
                    decode,
                    reducer,
                    started_on,
                    forecast,
                    truth,
                )
                if forecast is not None:
                    planning.furnish_measures(trainer, forecast.measures)
                named, shape = _base(host, model), first_of(shape_of(request.dataset))
                form, shifts = host.latent_format(model), host.sound_shifts(model)
                seen = host.picture_size(model, {"samples": torch.empty(1, *shape, device="meta")})

                def notes(steps: int, title: str) -> dict[str, str]:
                    own = recipes.preset_of(title, objective, denoiser, form, shifts)
                    recipe = _recipe(own, config.method, denoiser.architecture, named, request.recipe)
                    plain = metadata(config, steps, title, denoiser.architecture, denoiser.base_hash, VERSION)
                    return plain | ({recipes.KEY: recipe} if recipe else {})

                trainer.notes = lambda steps: notes(steps, f"{name}_step_{steps}")
                stopped, title = "", name
                try:
                    student = trainer.train()
                except Stopped as ended:
                    if not hand_out or not trainer.done:
                        raise
                    student, stopped, title = trainer.lora(), str(ended), f"{name}_step_{trainer.done}"
                planning.remember_pace(host, trainer)
                lora = denoiser.to_file(student)
                # Where a few-step student is called; whoever samples with the LoRA needs them.
                called = objective.student_levels
                timesteps = [
                    round(float(denoiser.schedule.timestep(level)), 3) for level in called if denoiser.levels.listed
                ]
                sigmas = [round(float(level), 6) for level in called]
                done, begun = trainer.done, trainer.begun
                noted = notes(done, title)
            finally:
                # Optimisers, averages and the decoder, too: the memory is wanted for looking at the LoRA's file.
                trainer = assembly = objective = data = decode = student = None  # type: ignore[assignment]
                denoiser.release()
    losses = column(inside(folder) / METRICS, "student_loss")
    if reducer is not None and reducer.rank:
        return Result(lora, losses, None, folder, done)
    path = None if done > begun else written(folder, host.loras_folder(), done)
    earlier = None
    if path is None:
        earlier = None if stopped else set_aside(folder, host.loras_folder(), name)
        path = write_lora(host.loras_folder(), title, lora, noted)
        written_down = {
            "file": path.name, "sha256": _hash(path), "steps": done, "timesteps": timesteps, "sigmas": sigmas,
            "base": named, "student": recipes.KEY in noted, "prompt": (request.dataset.prompts or [""])[0],
            "latent": list(shape), "size": list(seen),
        }  # fmt: skip
        write_json(inside(folder) / RESULT, written_down)
    changed = host.output_change(model, path, request.dataset)
    if not changed > 0:
        path.unlink()
        if stopped:
            raise Stopped(stopped)
        raise TrainingFailed(
            f"after {done} steps the LoRA changes nothing in this model's output, so no file was kept: raise "
            f"learning_rate or steps. The run's state is in {folder}"
        )
    taken = [] if stopped or path.stem == name else [f"another file is called {name}.safetensors"]
    taken += [] if earlier is None else [f"the earlier one is now {earlier.name}"]
    renamed = "; ".join(taken)
    watcher.says(f"{done} steps: {path.name}{renamed and f' ({renamed})'}")
    _log.info("the LoRA of run %s is %s", folder.name, path)
    return Result(read_lora(path), losses, path, folder, done, stopped, renamed)


def run_in_node(host: Host, model: MODEL, request: Request, *, watcher: Watcher, **given: Any) -> Result:
    """`run` as a node does it: status.json says how far it is, and the commands stop, save and sample are heard.

    A stop saves the run and gives its LoRA so far, so that the workflow goes on; where it has none yet, the node ends
    as by the host's own cancel. Raises what `run` does, BlockingIOError while a job works in the run's folder.
    """
    folder = host.runs_folder() / checked_name(request.name)
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    inside(folder).refuse_links()
    check_writable(folder)
    try:
        with holding(folder):
            return _told(host, model, request, watcher, folder, given)
    finally:
        # What was refused before it began is no run.
        if new and not (inside(folder) / METRICS).is_file():
            for name in (STATUS, LOCK):
                (inside(folder) / name).remove()
            with contextlib.suppress(OSError):
                for each in new:
                    each.rmdir()


def _told(host: Host, model: MODEL, request: Request, watcher: Watcher, folder: Path, given: dict[str, Any]) -> Result:
    clear_commands(folder)
    before = read_status(folder) if has_status(folder) else None
    with FileWatcher(folder, before, show=watcher) as told:
        try:
            refuse_other(inside(folder) / STATE, request.config)
            result = run(host, model, request, watcher=told, hand_out=True, **given)
        except (Stopped, host.CANCELLED) as ended:
            told.stop(str(ended) or "cancelled; queue it again to go on")
            raise host.CANCELLED() from ended
        except BaseException as error:
            told.fail(error)
            raise
        assert result.path is not None
        told.end("stopped" if result.stopped else "finished", result.stopped, result.path.name)
    _handed_out[request.name] += bool(result.stopped)
    return result


def written(folder: Path, loras: Path, steps: int) -> Path | None:
    """The LoRA that a run has written after so many steps, None when there is none or it is no longer as it was."""
    path, done = _last_written(folder, loras)
    return path if done == steps else None


def set_aside(folder: Path, loras: Path, name: str) -> Path | None:
    """Add its steps to the name of the LoRA that a run has written, so that the one after more steps takes its place;
    its new path. None where there is none, or where it stays: no longer as it was, called so already, or in use."""
    path, done = _last_written(folder, loras)
    if path is None or path.stem.startswith(f"{checked_name(name)}_step_"):
        return None
    data = path.read_bytes()
    same = loras / f"{path.stem}_step_{done}.safetensors"
    there = same.is_file() and same.read_bytes() == data
    kept = same if there else write_new(loras, same.stem, data)
    try:
        path.unlink()
    except OSError as error:  # on Windows, while somebody has loaded it
        _log.warning("%s stays as it is, since it is in use: %s", path.name, error)
        if not there:
            kept.unlink()
        return None
    return kept


def _last_written(folder: Path, loras: Path) -> tuple[Path | None, int]:
    try:
        noted = read_json(inside(folder) / RESULT)
        path = loras / f"{checked_name(noted['file'])}.safetensors"
        return (path if _hash(path) == noted["sha256"] else None), int(noted["steps"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # Nobody's record, or a damaged one: the LoRA is written anew under a free name.
        return None, 0


def _base(host: Host, model: MODEL) -> dict[str, Any] | None:
    """The model by the name of its file, None where no file says all of it."""
    try:
        base = host.describe_base(model)
    except ValueError:
        return None
    return None if base is None else base.to_json()


def _recipe(
    own: Preset | None, method: str, architecture: str, base: Mapping[str, Any] | None, started_as: str
) -> str:
    """The recipe of a few-step student, or, of a method that makes none, that of the student it began as."""
    if own is None:
        try:
            return started_as if recipes.read({recipes.KEY: started_as} if started_as else {}) else ""
        except ValueError as error:
            _log.warning("the LoRA's recipe is left out, since that of start_from is none: %s", error)
            return ""
    names = [str(base[key]) for key in ("file", "folder", "variant") if base and base.get(key)]
    known = {"architecture": architecture} | ({"name": Path(names[0]).name} if names else {})
    return recipes.written(recipes.Recipe(own, method, known))


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def place(
    host: Host, denoiser: HostDenoiser, config: RunConfig, forecast: Forecast | None, watcher: Watcher
) -> Forecast | None:
    """Bring the network to the device, and let as many of its blocks wait in host memory as `offload` says.

    The forecast with what is free by now, on the card and beside it. TrainingFailed for a run that has no room, where
    that is known before anything is there.
    """
    network, free = denoiser.network, host.free_memory()
    if forecast is None:
        count = offload.blocks_to_stream(config.training, len(units(network)), weights(network), free)
    else:
        host_free = planning.host_memory(forecast.counted.base)
        forecast = planning.with_pace(host, forecast, network, denoiser.device, denoiser.compute)
        forecast = replace(forecast, free=free, host_free=host_free).settled
        refused = problem(forecast.plan, config.training)
        if refused:
            raise TrainingFailed(refused)
        count = forecast.plan.streamed
    try:
        offload.placed(denoiser, count, host.pin, host.unpin, config.training, watcher.says)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise out_of_memory(error, config.training) from error
    ring = denoiser.ring
    if count and ring is not None:
        _log.info("%d of %d blocks are streamed, %s", ring.count, len(ring.blocks), size(ring.streamed_bytes))
    return forecast


def refuse_other_settings(host: Host, name: str, config: RunConfig) -> None:
    """ValueError for a name that no file can have, and for that of a run which was started with other settings."""
    refuse_other(inside(host.runs_folder() / checked_name(name)) / STATE, config)


def refuse_other_expert(config: RunConfig, connected: bool) -> None:
    """ValueError for a second network where the settings train no expert."""
    if connected and getattr(config.objective, "expert", "whole") == "whole":
        able = ", ".join(name for name, each in METHODS.items() if "expert" in declared(each.config))
        raise ValueError(
            f"other_expert: {config.method} trains a network of all levels here; set `expert` to high noise or low "
            f"noise, which {able} have, or disconnect it"
        )


def refuse_rewards(method: str, reward: bool, second: bool, vae: bool, prompts: bool) -> None:
    """ValueError for rewards that a method cannot use, or lacks something for.

    What is there: reward, second - a first and a second one; vae; prompts - texts, not only their encodings.
    """
    objective = METHODS[method].objective
    if second and not (objective.two_rewards and reward):
        able = ", ".join(name for name, each in METHODS.items() if each.objective.two_rewards)
        raise ValueError(
            f"reward_2: {method} takes one reward; join both with Combine Rewards, or choose {able} with `reward` "
            "connected"
        )
    if not reward:
        return
    if objective.rewards == "none":
        pleasing = ", ".join(name for name, each in METHODS.items() if each.objective.rewards != "none")
        raise ValueError(f"reward: {method} pleases none; choose one of {pleasing}, or disconnect it")
    if not vae:
        raise ValueError("a reward looks at pictures: connect `vae`")
    if not prompts:
        raise ValueError(
            "a reward reads prompts, and encoded ones cannot be read: type them in `prompts` and disconnect `positive`"
        )


def _refuse_without_gradient(reward: Reward, method: str) -> None:
    if not reward.differentiable:
        raise ValueError(
            f"the reward {reward.name} has no gradient, and {method} needs a differentiable one: PickScore, HPSv2, "
            "CLIP, aesthetic, ImageReward and the embedded judge are; spo and flow_grpo take any"
        )


class HostWatcher:
    """Shows a run in the host's own progress, and lets the host's cancel end it."""

    def __init__(self, host: Host, total: int):
        self._host, self._progress = host, host.progress(total)
        self._done = 0

    def check(self) -> None:
        """Raise the host's own interruption."""
        self._host.check_cancelled()

    def commands(self) -> set[str]:
        """A host asks for nothing but to end."""
        return set()

    def step(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """One step on."""
        self._done = done
        loss, rate = metrics.get("student_loss"), 1 / metrics["seconds"]
        text = "" if loss is None else f"step {done} of {total}, loss {loss:.4g}, {rate:.3g} steps/s"
        self._progress.step(done, text=text)

    def preview(self, images: Tensor, done: int, path: Inside) -> None:
        """Show the contact sheet on the node."""
        self._progress.step(done, preview=open_picture(path))

    def says(self, text: str) -> None:
        """A line on the node."""
        self._progress.step(self._done, text=text)

    def phase(self, name: str, done: int, total: int) -> None:
        """A line on the node: its bar counts steps."""
        self.says(f"{name}: {done} of {total}")
