"""What a run is put together from, on a real network or on one without weights: adapters, data, rewards, decoders."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...models.layouts.lora_names import Note
from ...restoration.perceptual import feature_distance
from ...rewards.contract import Reward
from ...rewards.scoring import score
from ...sampling.parts import Latent, Parts, Shape, each_of, first_of, several, shape_of
from ...trainers.adapters import LoraConfig
from ...trainers.checkpointing import units
from ...trainers.config import RunConfig
from ...trainers.data import Data
from ...trainers.dataset import Dataset, Entry
from ...trainers.decoder import Decoder
from ...trainers.methods import METHODS
from ...trainers.objectives.parts.contract import LOSER, STRENGTH, Batch, Draws, Objective, Tools
from ..contract import MODEL, VAE, Host
from ..rewards.kinds import perceptual_network
from .denoiser import HostDenoiser

FAKE_SEED = 1  # added to the run's seed for the fake score's adapter; further adapters count on
REFERENCES = "reference_latents"  # what a CONDITIONING calls them
PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}


def precision(config: RunConfig) -> torch.dtype | None:
    """The network's arithmetic; None leaves it as the host samples, as far as gradients allow."""
    return PRECISION.get(config.training.precision)


def add_adapters(
    denoiser: HostDenoiser,
    config: RunConfig,
    objective: Objective,
    start: dict[str, Tensor] | None,
    note: Note | None = None,
) -> None:
    """The adapters that the method's players name; the student begins as `start` where one is given.

    note, or the log, is told of layers of `start` that the network lacks.
    """
    lora: LoraConfig = config.lora
    denoiser.adapters.add("student", lora, config.training.seed)
    fake = replace(lora, rank=config.training.fake_rank or lora.rank, alpha=0.0, dropout=0.0)
    others = [player.adapter for player in objective.players.values() if player.adapter != "student"]
    for number, name in enumerate(others):
        denoiser.adapters.add(name, fake, config.training.seed + FAKE_SEED + number)
    if start is not None:
        denoiser.adapters.load_lora("student", denoiser.from_file(start, note))


def encode(denoiser: HostDenoiser, dataset: Dataset, sound_weight: float = 1.0) -> Data:
    """The data set as the network takes it; equal prompts of equal size are encoded once.

    Latents of several parts are packed; sound_weight: of all but the first of them.
    """
    shapes: list[Shape] = [dataset.shape or ()] if dataset.latents is None else [shape_of(t) for t in dataset.latents]
    known: dict[tuple[int, int, Shape], Any] = {}

    def made_up(shape: Shape) -> Parts:
        parts = several(shape)
        return Parts(parts, (1.0, *[sound_weight] * (len(parts) - 1)) if parts else (), denoiser.gains if parts else ())

    def whole(shape: Shape) -> tuple[int, ...]:
        parts = several(shape)
        return (1, sum(map(math.prod, parts))) if parts else denoiser.whole(first_of(shape))

    def stored(latent: Latent) -> Tensor:
        parts = made_up(shape_of(latent))
        return denoiser.latents_in(parts.pack([part[None] for part in each_of(latent)]), parts)[0]

    def cond(entry: Entry, shape: Shape, reference: Tensor | None = None, input: str = "positive") -> Any:
        key = (id(entry[0]), id(reference), shape)
        if key not in known:
            tokens, told = entry
            if reference is not None:
                told = {**told, REFERENCES: [*told.get(REFERENCES, []), reference[None]]}
            known[key] = denoiser.encode([[tokens, told]], (1, *whole(shape)), input, made_up(shape))
        return known[key]

    def empty(shape: Shape, reference: Tensor | None = None) -> Any:
        return None if dataset.negative is None else cond(dataset.negative, shape, reference, "negative")

    each = shapes if dataset.latents is not None else shapes * len(dataset.entries)
    shown: Sequence[Tensor | None] = dataset.references or [None] * len(dataset.entries)
    return Data(
        conds=[cond(*sample) for sample in zip(dataset.entries, each, shown, strict=True)],
        prompts=dataset.prompts,
        uncond=empty(shapes[0], shown[0]),
        unconds={}
        if dataset.negative is None or dataset.references is not None
        else {several(shape) or whole(shape): empty(shape) for shape in dict.fromkeys(shapes)},
        own_unconds=()
        if dataset.negative is None or dataset.references is None
        else [empty(*sample) for sample in zip(each, shown, strict=True)],
        latents=None if dataset.latents is None else [stored(latent) for latent in dataset.latents],
        shape=None if dataset.shape is None else whole(dataset.shape),
        pictures=dataset.pictures,
        columns={}
        if dataset.losers is None
        else {
            LOSER: [stored(latent) for latent in dataset.losers],
            STRENGTH: [torch.tensor(s) for s in dataset.strengths or []],
        },
        parts=[made_up(shape) for shape in each] if several(shapes[0]) else (),
    )


def through_decoder(config: RunConfig, rewards: Sequence[Reward | None]) -> bool:
    """Whether gradients pass a run's decoder: those of a reward, or of the network that its method looks with."""
    kind = METHODS[config.method].objective
    return kind.feature_network(config.objective) is not None or (kind.rewards == "differentiable" and any(rewards))


class Assembly:
    """A run's objective with its adapters, and then its data.

    rewards: one, and for some methods a second. start: a LoRA that the student begins as. other: the expert that is not
    trained, see `Tools`; ValueError for one that does not belong to the network. The networks that the objective's
    tools look with are made with the data, when the base has its place.
    """

    def __init__(
        self,
        host: Host,
        denoiser: HostDenoiser,
        config: RunConfig,
        vae: VAE,
        rewards: Sequence[Reward | None] = (),
        start: dict[str, Tensor] | None = None,
        other: MODEL = None,
    ):
        self._host, self._denoiser, self._vae = host, denoiser, vae
        self._sound_weight = config.training.sound_weight
        kind = METHODS[config.method].objective
        self._network = kind.feature_network(config.objective)
        self._gradients = through_decoder(config, rewards)
        reward, second = (
            None if each is None else latent_reward(each, self._pictures, denoiser)
            for each in (*rewards, None, None)[:2]
        )
        self._decoder: Decoder | None = None
        self._eye: Any = None
        distance = None if self._network is None else self._feature_distance
        if other is not None:
            with asked(host, other, config) as expert:
                refuse_stranger(denoiser, expert)
        tools = Tools(reward, second, distance, None if other is None else partial(asked, host, other, config))
        self.objective = kind(config.objective, denoiser, tools)
        add_adapters(denoiser, config, self.objective, start, partial(host.say, warn=True))

    def data(self, dataset: Dataset) -> Data:
        """The data as the network takes them, with their damage where the method learns from damaged pictures."""
        data = encode(self._denoiser, dataset, self._sound_weight)
        if "pictures" in self.objective.needs:
            if data.pictures is None or self._vae is None:
                raise ValueError(
                    "a restorer learns from pictures, which it degrades and encodes: connect `images` and `vae`"
                )
            data.degrade = self._degraded
        if self._gradients:
            self._decoder = self._host.differentiable_decoder(self._vae)
        if self._network is not None:
            self._eye = perceptual_network(self._host, self._network).to(self._denoiser.device)
        return data

    def _pictures(self, samples: Tensor) -> Tensor:
        # Without a gradient, the VAE that everybody uses, where the host places it.
        return self._host.decode(self._vae, samples) if self._decoder is None else self._decoder(samples)

    def _degraded(self, images: Tensor, draws: Draws) -> Tensor:
        """Degraded by the objective, encoded by the VAE where the host places it."""
        spoilt = self.objective.spoil(images, draws)
        return self._denoiser.latents_in(self._host.encode_images(self._vae, spoilt)["samples"])

    def _feature_distance(self, x0: Tensor, clean: Tensor) -> Tensor:
        def seen(latents: Tensor) -> list[Tensor]:
            return self._eye(self._pictures(self._denoiser.latents_out(latents)).to(self._denoiser.device))

        with torch.no_grad():
            wanted = seen(clean)
        return feature_distance(seen(x0), wanted)


@contextmanager
def asked(host: Host, model: MODEL, config: RunConfig) -> Iterator[HostDenoiser]:
    """A MODEL that is not trained, for as long as it is asked; on a card all of its blocks are streamed."""
    try:
        denoiser = host.trainable(model, precision(config))
    except ValueError as error:
        raise ValueError(f"other_expert: {error}") from error
    try:
        denoiser.place(0 if host.free_memory() is None else len(units(denoiser.network)), host.pin, host.unpin)
        yield denoiser
    finally:
        denoiser.release()


def refuse_stranger(denoiser: HostDenoiser, other: HostDenoiser) -> None:
    """ValueError for an expert that cannot go on where another ends: of other coordinates, or another kind."""

    def build(network: nn.Module) -> dict[str, tuple[int, ...]]:
        # Matrices may be stored in any way, and have scales beside them.
        return {name: tuple(p.shape) for name, p in network.named_parameters() if p.ndim != 2}

    mine, its = build(denoiser.network), build(other.network)
    shared = mine.keys() & its.keys()
    same_path = (denoiser.path, denoiser.prediction) == (other.path, other.prediction)
    same = same_path and denoiser.architecture == other.architecture
    if not same or not shared or any(mine[name] != its[name] for name in shared):
        raise ValueError(
            f"other_expert is no network of the same build as model ({other.architecture} and {denoiser.architecture}):"
            " connect the other of the two files, such as Wan 2.2's low noise beside its high noise"
        )


def latent_reward(
    reward: Reward, pictures: Callable[[Tensor], Tensor], denoiser: HostDenoiser
) -> Callable[..., Tensor]:
    def scored(x0: Tensor, prompts: tuple[str, ...], batch: Batch) -> Tensor:
        return score(reward, pictures(denoiser.latents_out(x0)), list(prompts)).to(x0.device)

    return scored
