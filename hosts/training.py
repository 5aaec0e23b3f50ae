"""A training run, whoever asked for it: encode, add adapters, train, write the LoRA, see that its file works.

A node calls `run` with its MODEL, the job process with the one it loaded; both get the same weights, to the bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..restoration.perceptual import feature_distance
from ..rewards.contract import Reward
from ..rewards.scoring import score
from ..trainers.adapters import LoraConfig
from ..trainers.checkpointing import units
from ..trainers.config import RunConfig
from ..trainers.data import Data, Degrade
from ..trainers.dataset import Dataset, Entry
from ..trainers.decoder import Decoder
from ..trainers.export import VERSION, metadata, read_lora, write_lora
from ..trainers.files import check_writable, checked_name, write_json
from ..trainers.folder import Inside, inside
from ..trainers.job import LOCK
from ..trainers.job_watch import STATUS, FileWatcher, clear_commands, has_status, holding, read_status
from ..trainers.log_file import METRICS, column
from ..trainers.loop import Reducer, Stopped, Trainer, TrainingFailed
from ..trainers.memory import size, weights
from ..trainers.methods import METHODS
from ..trainers.objectives.contract import Batch, Draws, Objective
from ..trainers.objectives.dmd2 import DMD2
from ..trainers.objectives.preference import LOSER, STRENGTH
from ..trainers.objectives.tdm import TDM
from ..trainers.offload import blocks_to_stream
from ..trainers.origin import origin
from ..trainers.strangers import read_json
from ..trainers.watch import Watcher, open_picture
from .rewards import perceptual_network

FAKE_SEED = 1  # added to the run's seed for the fake score's adapter; further adapters count on
RESULT = "result.json"
PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}
_log = logging.getLogger("retort.training")


@dataclass
class Request:
    """What is to be trained. name: of the LoRA and of the run's folder; start: a LoRA that the student begins as."""

    name: str
    config: RunConfig
    dataset: Dataset
    start: dict[str, Tensor] | None = None


@dataclass
class Result:
    """lora: as core loaders read it. losses: the student's, step by step. path: the file; folder: the run's."""

    lora: dict[str, Tensor]
    losses: list[float]
    path: Path | None
    folder: Path
    steps: int


def run(
    host: Any,
    model: Any,
    request: Request,
    *,
    watcher: Watcher,
    vae: Any = None,
    reward: Reward | None = None,
    second: Reward | None = None,
    folder: Path | None = None,
    reducer: Reducer | None = None,
) -> Result:
    """Train, and return when the LoRA is written and found to change the model's output.

    host: the module of `hosts.api`. second: another reward, which AlignProp balances with the first. folder: the run's
    own (default: the host's, by name). Raises what `trainers.loop.Trainer` does, ValueError for settings and data that
    cannot go together.
    """
    name = checked_name(request.name)
    folder = folder or host.runs_folder() / name
    inside(folder).refuse_links()
    config = request.config
    if second is not None and (config.method != "align_prop" or reward is None):
        raise ValueError(
            f"reward_2: {config.method} takes one reward; join both with Combine Rewards, or choose align_prop with "
            "`reward` connected"
        )
    for each in (reward, second):
        if each is not None:
            _check_reward(each, vae, request)
    for needed in (folder, host.loras_folder()):
        check_writable(needed)
    with host.training_session():
        denoiser = host.trainable(model, precision(config))
        try:
            objective, decoder = METHODS[config.method].objective(config.objective, denoiser), None
            add_adapters(denoiser, config, objective, request.start)
            place(host, denoiser, config)
            data = encode(denoiser, request.dataset)
            if METHODS[config.method].pictures:
                data.degrade = _degrade(host, objective, denoiser, request.dataset, vae)
                if config.objective.feature_weight:
                    decoder = host.differentiable_decoder(vae)
                    objective.features = _feature_distance(host, config.objective.features, decoder, denoiser)
            decode = denoiser.preview if vae is None else (lambda x0: host.decode(vae, denoiser.latents_out(x0)))
            if METHODS[config.method].reward == "differentiable" and reward is not None:
                decoder = host.differentiable_decoder(vae)
            # Without a gradient, the VAE that everybody uses, where the host places it.
            pictures = decoder or (lambda samples: host.decode(vae, samples))
            if reward is not None:
                objective.reward = _latent_reward(reward, pictures, denoiser)
            if second is not None:
                objective.second = _latent_reward(second, pictures, denoiser)
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
                host.free_memory,
                reducer,
                started_on,
                decoder,
            )
            lora = denoiser.to_file(trainer.train())
            base_hash, architecture = denoiser.base_hash, denoiser.architecture
            # Where a few-step student is called; whoever samples with the LoRA needs them.
            timesteps = [round(float(denoiser.schedule.timestep(level)), 3) for level in student_levels(objective)]
            done, begun = trainer.done, trainer.begun
        finally:
            # Optimisers, averages and the decoder too: the memory is wanted for looking at the LoRA's file.
            trainer = objective = data = decode = decoder = pictures = None
            denoiser.release()
    losses = column(inside(folder) / METRICS, "student_loss")
    if reducer is not None and reducer.rank:
        return Result(lora, losses, None, folder, done)
    path = None if done > begun else written(folder, host.loras_folder(), done)
    if path is None:
        notes = metadata(config, done, name, architecture, base_hash, VERSION)
        path = write_lora(host.loras_folder(), name, lora, notes)
        written_down = {
            "file": path.name, "sha256": _hash(path), "steps": done, "timesteps": timesteps,
            "base": _base(host, model),
        }  # fmt: skip
        write_json(inside(folder) / RESULT, written_down)
    changed = host.output_change(model, path, request.dataset)
    if not changed > 0:
        path.unlink()
        raise TrainingFailed(
            f"after {done} steps the LoRA changes nothing in this model's output, so no file was kept: raise "
            f"learning_rate or steps. The run's state is in {folder}"
        )
    taken = "" if path.stem == name else f", since another file is called {name}.safetensors"
    watcher.says(f"{done} steps: {path.name}{taken}")
    _log.info("the LoRA of run %s is %s%s", folder.name, path, taken)
    return Result(read_lora(path), losses, path, folder, done)


def run_in_node(host: Any, model: Any, request: Request, *, watcher: Watcher, **given: Any) -> Result:
    """`run` as a node does it: status.json says how far it is, and the commands stop, save and sample are heard.

    A stop saves the run and then ends the node as the host's own cancel does. Raises what `run` does, BlockingIOError
    while a job works in the run's folder.
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


def _told(host: Any, model: Any, request: Request, watcher: Watcher, folder: Path, given: dict[str, Any]) -> Result:
    clear_commands(folder)
    before = read_status(folder) if has_status(folder) else None
    with FileWatcher(folder, before, show=watcher) as told:
        try:
            result = run(host, model, request, watcher=told, **given)
        except (Stopped, host.CANCELLED) as ended:
            told.end("stopped", str(ended) or "cancelled; queue it again to go on")
            raise host.CANCELLED() from ended
        except BaseException as error:
            told.fail(error)
            raise
        assert result.path is not None
        told.end("finished", lora=result.path.name)
    return result


def student_levels(objective: Objective) -> list[Tensor]:
    """The levels at which a few-step student is called, highest first; none for other methods."""
    if isinstance(objective, DMD2):
        return list(objective.sigmas[:-1])
    return list(objective.grids[objective.config.steps][:-1]) if isinstance(objective, TDM) else []


def precision(config: RunConfig) -> torch.dtype | None:
    """The network's arithmetic; None leaves it as the host samples, as far as gradients allow."""
    return PRECISION.get(config.training.precision)


def written(folder: Path, loras: Path, steps: int) -> Path | None:
    """The LoRA that a run has written after so many steps, None when there is none or it is no longer as it was."""
    try:
        noted = read_json(inside(folder) / RESULT)
        path = loras / f"{checked_name(noted['file'])}.safetensors"
        return path if noted["steps"] == steps and _hash(path) == noted["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # Nobody's record, or a damaged one: the LoRA is written anew under a free name.
        return None


def _base(host: Any, model: Any) -> dict[str, Any] | None:
    """The model by the name of its file, None where no file says all of it."""
    try:
        base = host.describe_base(model)
    except ValueError:
        return None
    return None if base is None else base.to_json()


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def add_adapters(denoiser: Any, config: RunConfig, objective: Objective, start: dict[str, Tensor] | None) -> None:
    """The adapters that the method's players name; the student begins as `start` where one is given."""
    lora: LoraConfig = config.lora
    denoiser.adapters.add("student", lora, config.training.seed)
    fake = replace(lora, rank=config.training.fake_rank or lora.rank, alpha=0.0, dropout=0.0)
    others = [player.adapter for player in objective.players.values() if player.adapter != "student"]
    for number, name in enumerate(others):
        denoiser.adapters.add(name, fake, config.training.seed + FAKE_SEED + number)
    if start is not None:
        denoiser.adapters.load_lora("student", denoiser.from_file(start))


def place(host: Any, denoiser: Any, config: RunConfig) -> None:
    """Bring the network to the device, and let as many of its blocks wait in host memory as `offload` says."""
    network = denoiser.network
    count = blocks_to_stream(config.training, len(units(network)), weights(network), host.free_memory())
    denoiser.place(count, host.pin, host.unpin)
    if count:
        ring = denoiser.ring
        _log.info("%d of %d blocks are streamed, %s", ring.count, len(ring.blocks), size(ring.streamed_bytes))


def encode(denoiser: Any, dataset: Dataset) -> Data:
    """The data set as the network takes it; equal prompts of equal size are encoded once."""
    shapes = [tuple(t.shape) for t in dataset.latents] if dataset.latents is not None else [dataset.shape]
    known: dict[tuple[int, Any], Any] = {}

    def cond(entry: Entry, shape: Any, input: str = "positive") -> Any:
        key = (id(entry[0]), shape)
        if key not in known:
            known[key] = denoiser.encode([list(entry)], (1, *shape), input)
        return known[key]

    each = shapes if dataset.latents is not None else shapes * len(dataset.entries)
    return Data(
        conds=[cond(entry, shape) for entry, shape in zip(dataset.entries, each, strict=True)],
        prompts=dataset.prompts,
        uncond=None if dataset.negative is None else cond(dataset.negative, shapes[0], "negative"),
        unconds={}
        if dataset.negative is None
        else {s: cond(dataset.negative, s, "negative") for s in dict.fromkeys(shapes)},
        latents=None if dataset.latents is None else [denoiser.latents_in(t[None])[0] for t in dataset.latents],
        shape=dataset.shape,
        pictures=dataset.pictures,
        columns={}
        if dataset.losers is None
        else {
            LOSER: [denoiser.latents_in(t[None])[0] for t in dataset.losers],
            STRENGTH: [torch.tensor(s) for s in dataset.strengths or []],
        },
    )


def _check_reward(reward: Reward, vae: Any, request: Request) -> None:
    wanted = METHODS[request.config.method].reward
    if wanted == "none":
        pleasing = ", ".join(name for name, method in METHODS.items() if method.reward != "none")
        raise ValueError(
            f"reward: {request.config.method} pleases none; choose one of {pleasing}, or disconnect {reward.name}"
        )
    if vae is None:
        raise ValueError(f"the reward {reward.name} looks at pictures: connect a VAE")
    if wanted == "differentiable" and not reward.differentiable:
        raise ValueError(
            f"the reward {reward.name} has no gradient, and {request.config.method} needs a differentiable one: "
            "PickScore, HPSv2, CLIP, aesthetic, ImageReward and the embedded judge are; spo and flow_grpo take any"
        )
    if not request.dataset.prompts:
        raise ValueError(
            f"the reward {reward.name} reads prompts, and encoded ones cannot be read: type them in `prompts` and "
            "disconnect `positive`"
        )


def _latent_reward(reward: Reward, pictures: Callable[[Tensor], Tensor], denoiser: Any) -> Callable[..., Tensor]:
    def scored(x0: Tensor, prompts: tuple[str, ...], batch: Batch) -> Tensor:
        return score(reward, pictures(denoiser.latents_out(x0)), list(prompts)).to(x0.device)

    return scored


def _degrade(host: Any, objective: Any, denoiser: Any, dataset: Dataset, vae: Any) -> Degrade:
    """Degrades with the objective, encodes with the VAE where the host places it."""
    if dataset.pictures is None or vae is None:
        raise ValueError("a restorer learns from pictures, which it degrades and encodes: connect `images` and `vae`")

    def degraded(images: Tensor, draws: Draws) -> Tensor:
        return denoiser.latents_in(host.encode_images(vae, objective.spoil(images, draws))["samples"])

    return degraded


def _feature_distance(host: Any, name: str, decode: Decoder, denoiser: Any) -> Callable[[Tensor, Tensor], Tensor]:
    network = perceptual_network(host, name).to(denoiser.device)

    def distance(x0: Tensor, clean: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = network(decode(denoiser.latents_out(clean)).to(denoiser.device))
        return feature_distance(network(decode(denoiser.latents_out(x0)).to(denoiser.device)), wanted)

    return distance


class HostWatcher:
    """Shows a run in the host's own progress, and lets the host's cancel end it. shown: whether a picture was."""

    def __init__(self, host: Any, total: int):
        self._host, self._progress = host, host.progress(total)
        self._done = 0
        self.shown = False

    def check(self) -> None:
        """Raise the host's own interruption."""
        self._host.check_cancelled()

    def wishes(self) -> set[str]:
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
        self.shown = True

    def says(self, text: str) -> None:
        """A line on the node."""
        self._progress.step(self._done, text=text)
