"""What a training run will take in memory, before a weight of it is loaded: for a run, a node and the command line."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...files.atomic import write_json
from ...rewards.contract import Reward
from ...sampling.parts import Latent, each_of
from ...trainers import dry_run
from ...trainers.config import RunConfig
from ...trainers.counted import Counted
from ...trainers.dataset import PLAIN, Dataset, Entry
from ...trainers.denoiser import Denoiser
from ...trainers.export import VERSION
from ...trainers.loop import Trainer
from ...trainers.methods import METHODS
from ...trainers.pace import tried
from ...trainers.planning import ALONE, INPUTS, MEASURES, STATE, WITH_GRAPHS, Forecast
from ...trainers.weightless import META, weightless_copy
from ..contract import MODEL, VAE, Host
from .assembly import REFERENCES, Assembly, precision, through_decoder
from .denoiser import HostDenoiser

REMEMBERED = ".counted.json"
PACES = ".paces.json"
_MOST = 200  # counts, and paces, that are remembered
_log = logging.getLogger("retort.training")


def forecast(
    host: Host,
    model: MODEL,
    config: RunConfig,
    dataset: Dataset,
    vae: VAE = None,
    rewards: Sequence[Reward | None] = (),
) -> Forecast | None:
    """What a run takes on this machine; None where there is no accelerator, or the network cannot be run dry."""
    free = host.free_memory()
    if free is None:
        return None
    try:
        known = host.runs_folder() / REMEMBERED
        found = counted(host, model, config, dataset, vae, rewards, remembered=known)
        made = Forecast(found, config.training, free)
        if made.plan.streamed or not made.plan.on_card:
            made = replace(made, more=with_measures(host, model, config, dataset, vae, rewards, remembered=known))
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        # Whatever a network does that needs its numbers, the run itself can still be tried, and says what cannot be.
        _log.warning("memory could not be counted beforehand: %s", str(error).partition("\n")[0])
        return None
    return made


def counted(
    host: Host,
    model: MODEL,
    config: RunConfig,
    dataset: Dataset,
    vae: VAE = None,
    rewards: Sequence[Reward | None] = (),
    compute: torch.dtype | None = None,
    remembered: Path | None = None,
    measures: Sequence[str] = (),
    whole: bool = False,
) -> Counted:
    """A step of this run without its weights, as its largest picture, reference and prompt make it.

    compute: precision of the arithmetic, where this machine's own is not meant. remembered: a file of earlier counts.
    measures: one of `planning.WITH_GRAPHS`: what waits in host memory, and that graphs do not. whole: count every
    block, not shallow copies.
    Not counted: a VAE and rewards that are asked without a gradient, which the host places and frees, and previews.
    Raises what the run itself would raise for settings that cannot be, and RuntimeError and the like for a network that
    cannot be run without numbers.
    """
    outline = host.outline(model, compute or precision(config))
    sample = largest(dataset)
    key = _key(host, outline.network, config, sample, vae, rewards, measures)
    known = _read(remembered)
    if key in known:
        return Counted(**{**known[key], "blocks": tuple(known[key]["blocks"])})
    dry = _Dry(host, sample)

    def trainer(denoiser: Denoiser) -> Trainer:
        # Accumulated batches take no more than two: from the second on, gradients are there already.
        # Whatever keeps the optimiser may not be installed, so that its state is counted by itself.
        training = replace(
            config.training,
            accumulation=min(2, config.training.accumulation),
            noise_scale_target=0.0,
            optimiser="adamw",
        )
        own = cast(HostDenoiser, denoiser)  # made by the host's outline
        assembly = Assembly(dry, own, config, vae, [each and weightless_reward(each) for each in rewards])
        objective, data = assembly.objective, assembly.data(sample)
        objective.heaviest = ALONE not in measures
        if objective.pairs:
            each = torch.zeros(data.shape_of(0), dtype=torch.float16)
            # Which of a sample's pairs it is, is a number that is read, and so 1.
            data.pairs = {name: [each] * 2 * len(data) for name in ("noise", "target")}
        made = Trainer(denoiser, objective, data, replace(config, training=training), Path())
        furnish_measures(made, measures)
        return made

    with host.training_session():
        # A discriminator looks at a share of the depth, which shallow copies do not have in the same place.
        inside = METHODS[config.method].objective.looks_inside(config.objective)
        count = dry_run.run if whole or inside else dry_run.count
        found = count(outline, trainer, optimiser=config.training.optimiser)
    if remembered is not None:
        known[key] = asdict(found)
        remembered.parent.mkdir(parents=True, exist_ok=True)
        write_json(remembered, dict(list(known.items())[-_MOST:]))
    return found


def with_measures(
    host: Host, model: MODEL, config: RunConfig, *given: Any, **named: Any
) -> tuple[tuple[tuple[str, ...], Counted], ...]:
    """`counted` once more for each measure that can make the run smaller, with what it is given."""
    return tuple(
        (measures, counted(host, model, config, *given, **{**named, "measures": measures})) for measures in able(config)
    )


def able(config: RunConfig) -> tuple[tuple[str, ...], ...]:
    """The measures that can make a run smaller."""
    return WITH_GRAPHS if METHODS[config.method].objective.graphs_wait(config.objective) else MEASURES


def furnish_measures(trainer: Trainer, measures: Sequence[str]) -> None:
    """Let a trainer keep these in host memory, and graphs beside others unless they are to be alone."""
    trainer.host_inputs, trainer.host_state = INPUTS in measures, STATE in measures
    trainer.denoiser.keeps_graphs = ALONE not in measures


def largest(dataset: Dataset) -> Dataset:
    """One sample, of the largest picture, the longest prompt and the largest references, without pictures' numbers."""
    entry = _largest_entry(dataset.entries)
    latents: list[Latent] | None = None
    if dataset.latents is not None:
        most = max(dataset.latents, key=lambda latent: sum(part.numel() for part in each_of(latent)))
        zeros = tuple(torch.zeros(part.shape) for part in each_of(most))
        latents = [zeros[0] if isinstance(most, Tensor) else zeros]
    picture = max(dataset.pictures, key=Tensor.numel) if dataset.pictures else None
    prompt = max(dataset.prompts, key=len, default="")
    return Dataset(
        [entry],
        [prompt] if prompt else [],
        dataset.negative,
        latents,
        dataset.shape,
        latents if dataset.losers is not None else None,
        [1.0] if dataset.losers is not None else None,
        None if picture is None else [torch.zeros_like(picture)],
        [torch.zeros_like(max(dataset.references, key=Tensor.numel))] if dataset.references else None,
    )


def _largest_entry(entries: Sequence[Entry]) -> Entry:
    """The longest prompt's, with the largest that any is told besides; references, too, where it has none itself."""
    tokens, told = max(entries, key=lambda entry: entry[0].numel())
    most = dict(told)
    for _, other in entries:
        for name in other.keys() & {*told, REFERENCES}:
            if _numbers(other[name]) > _numbers(most.get(name)):
                most[name] = other[name]
    return tokens, most


def _numbers(value: Any) -> int:
    """How many numbers the tensors of something that a network is told hold."""
    if isinstance(value, list | tuple):
        return sum(map(_numbers, value))
    return value.numel() if isinstance(value, Tensor) else 0


def host_memory(base: int) -> int | None:
    """Bytes of host memory that a run whose base takes so many may have, None where the system does not say.

    What programs may still take, and what of the base this process holds already; files that are mapped count as free.
    """
    try:
        free, held = _row("/proc/meminfo", "MemAvailable"), _row("/proc/self/status", "RssAnon")
    except (OSError, StopIteration, ValueError):
        try:
            import psutil
        except ImportError:
            return None
        free, held = int(psutil.virtual_memory().available), base
    return free + min(held, base)


def with_pace(
    host: Host, forecast: Forecast, network: nn.Module, device: torch.device | None, compute: torch.dtype | None
) -> Forecast:
    """The forecast with how fast this card trains such a network: as the last run did, else as a trial says;
    as it is where nothing can be said."""
    if device is None or device.type == "cpu":
        return forecast
    compute = compute or _usual(host)
    known = _read(host.runs_folder() / PACES).get(_card(network, device, compute))
    if isinstance(known, list) and len(known) == 2 and all(isinstance(each, float) and each > 0 for each in known):
        return replace(forecast, speed=known[0], bus=known[1])
    found = tried(device, compute)
    return forecast if found is None else replace(forecast, speed=found.speed, bus=found.bus or forecast.bus)


def remember_pace(host: Host, trainer: Trainer) -> None:
    """Keep what a run's steps took on this card for the next run's forecast; not of its first, which sets things up."""
    denoiser, forecast, ring = trainer.denoiser, trainer.forecast, trainer.denoiser.ring
    if forecast is None or not trainer.took or trainer.objective.varies:
        return
    computed = statistics.median(trainer.took) - (forecast.with_streamed(ring.count if ring else 0).waits or 0.0)
    if computed <= 0:  # copies were faster than was told
        return
    timed = forecast.timed(computed, None)
    path = host.runs_folder() / PACES
    known = _read(path)
    known[_card(denoiser.network, denoiser.device, denoiser.compute or _usual(host))] = [timed.speed, timed.bus]
    try:
        write_json(path, dict(list(known.items())[-_MOST:]))
    except OSError as error:  # what was trained matters more
        _log.warning("the pace of this card was not kept: %s", error)


def _usual(host: Host) -> torch.dtype:
    """The precision in which networks are trained here, where neither settings nor the network say."""
    return torch.bfloat16 if host.bf16() else torch.float16


def _card(network: nn.Module, device: torch.device, compute: torch.dtype) -> str:
    module = torch.get_device_module(device)
    name = module.get_device_name(device) if hasattr(module, "get_device_name") else device.type
    stored = {str(weight.dtype) for name, weight in network.named_parameters() if ".lora_" not in name}
    return f"{name}, {type(network).__name__}, {compute}, {', '.join(sorted(stored))}"


def _row(path: str, name: str) -> int:
    with open(path, encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


class _Dry:
    """A host whose decoder has no weights, and whose VAE costs nothing."""

    def __init__(self, host: Host, sample: Dataset):
        self._host, self._sample = host, sample

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)

    def differentiable_decoder(self, vae: VAE) -> Any:
        """The host's, without weights."""
        return self._host.outlined_decoder(vae)

    def decode(self, vae: VAE, samples: Tensor) -> Tensor:
        """Pictures of no use, on the CPU."""
        return torch.zeros(len(samples), 8, 8, 3)

    def encode_images(self, vae: VAE, images: Tensor) -> dict[str, Tensor]:
        """Latents of no use, of the sample's size."""
        assert self._sample.latents is not None
        return {"samples": torch.stack([each_of(self._sample.latents[0])[0]] * len(images))}


class _Bare:
    """See `rewards.contract.Holder`: a network without weights."""

    def __init__(self, network: nn.Module):
        self.network = weightless_copy(network)

    def load(self) -> torch.device:
        """It is nowhere else."""
        return META

    def offload(self) -> None:
        """Nothing to free."""


def weightless_reward(reward: Reward) -> Reward:
    """The same reward on networks without weights."""
    return copy.deepcopy(reward, {key: _Bare(network) for key, network in _networks(reward).items()})


def _networks(reward: Reward) -> dict[int, nn.Module]:
    """What a reward looks with, by the address of what holds it."""
    known: dict[int, nn.Module] = {}

    def look(value: Any, depth: int = 0) -> None:
        if isinstance(getattr(value, "network", None), nn.Module) and hasattr(value, "offload"):
            known[id(value)] = value.network
        elif depth < 5:
            inside = value if isinstance(value, list | tuple) else getattr(value, "__dict__", {})
            for part in inside.values() if isinstance(inside, dict) else inside:
                look(part, depth + 1)

    look(reward)
    return known


def _key(
    host: Host,
    network: nn.Module,
    config: RunConfig,
    sample: Dataset,
    vae: VAE,
    rewards: Sequence[Reward | None],
    measures: Sequence[str],
) -> str:
    """What a count depends on: architectures, formats, sizes, settings and versions."""
    settings = config.to_json()
    for free in ("steps", "name", "seed", "learning_rate", "preview_every", "previews", "save_every", "save_minutes",
                 "keep", "offload"):  # fmt: skip
        settings["training"].pop(free, None)
    shown = (sample.entries, sample.negative, sample.latents, sample.shape, sample.pictures, sample.references)
    decoded = vae is not None and through_decoder(config, rewards)
    decoder = _layers(host.outlined_decoder(vae).network) if decoded else vae is not None
    looks = [(each.name, *map(_layers, _networks(each).values())) for each in rewards if each is not None]
    versions = host.NAME, host.VERSION, VERSION, str(torch.__version__)
    parts = [_layers(network), settings, _form(shown), decoder, looks, measures, versions]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _layers(network: nn.Module) -> list[tuple[str, tuple[int, ...], str]]:
    return [(name, tuple(weight.shape), str(weight.dtype)) for name, weight in network.named_parameters()]


def _form(value: Any, depth: int = 6) -> Any:
    """Shapes and formats of the tensors in something, and what else tells one size of it from another, for JSON."""
    if isinstance(value, Tensor):
        return [str(value.dtype), *value.shape]
    if value is None or isinstance(value, PLAIN):
        return value
    if isinstance(value, nn.Module) or not depth:
        return type(value).__name__
    if isinstance(value, list | tuple):
        return [_form(part, depth - 1) for part in value]
    inside = value if isinstance(value, Mapping) else vars(value) if hasattr(value, "__dict__") else {}
    return [type(value).__name__, {str(name): _form(part, depth - 1) for name, part in inside.items()}]


def _read(remembered: Path | None) -> dict[str, Any]:
    if remembered is None or not os.path.isfile(remembered):
        return {}
    try:
        found = json.loads(remembered.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
