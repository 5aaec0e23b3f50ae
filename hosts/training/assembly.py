"""What a run is put together from, on a real network or on one without weights: adapters, data, rewards, decoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...restoration.perceptual import feature_distance
from ...rewards.contract import Reward
from ...rewards.scoring import score
from ...trainers.adapters import LoraConfig
from ...trainers.config import RunConfig
from ...trainers.data import Data, Degrade
from ...trainers.dataset import Dataset, Entry
from ...trainers.decoder import Decoder
from ...trainers.methods import METHODS
from ...trainers.objectives.parts.contract import Batch, Draws, Objective
from ...trainers.objectives.parts.preference import LOSER, STRENGTH
from ..contract import VAE, Host
from ..rewards.kinds import perceptual_network

FAKE_SEED = 1  # added to the run's seed for the fake score's adapter; further adapters count on
PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}


def precision(config: RunConfig) -> torch.dtype | None:
    """The network's arithmetic; None leaves it as the host samples, as far as gradients allow."""
    return PRECISION.get(config.training.precision)


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


def encode(denoiser: Any, dataset: Dataset) -> Data:
    """The data set as the network takes it; equal prompts of equal size are encoded once."""
    shapes: list[Any] = [tuple(t.shape) for t in dataset.latents] if dataset.latents is not None else [dataset.shape]
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


def furnish(
    host: Host,
    objective: Any,
    denoiser: Any,
    data: Data,
    config: RunConfig,
    vae: VAE,
    rewards: Sequence[Reward | None] = (),
) -> None:
    """Give an objective its rewards and features, and the data their damage, where the method takes them."""
    method, decoder = METHODS[config.method], None
    if method.pictures:
        data.degrade = _degrade(host, objective, denoiser, data, vae)
        if config.objective.feature_weight:
            decoder = host.differentiable_decoder(vae)
            objective.features = _feature_distance(host, config.objective.features, decoder, denoiser)
    if method.reward == "differentiable" and any(rewards):
        decoder = host.differentiable_decoder(vae)
    # Without a gradient, the VAE that everybody uses, where the host places it.
    pictures = decoder or (lambda samples: host.decode(vae, samples))
    for name, reward in zip(("reward", "second"), rewards, strict=False):
        if reward is not None:
            setattr(objective, name, latent_reward(reward, pictures, denoiser))


def latent_reward(reward: Reward, pictures: Callable[[Tensor], Tensor], denoiser: Any) -> Callable[..., Tensor]:
    def scored(x0: Tensor, prompts: tuple[str, ...], batch: Batch) -> Tensor:
        return score(reward, pictures(denoiser.latents_out(x0)), list(prompts)).to(x0.device)

    return scored


def _degrade(host: Host, objective: Any, denoiser: Any, data: Data, vae: VAE) -> Degrade:
    """Degrades with the objective, encodes with the VAE where the host places it."""
    if data.pictures is None or vae is None:
        raise ValueError("a restorer learns from pictures, which it degrades and encodes: connect `images` and `vae`")

    def degraded(images: Tensor, draws: Draws) -> Tensor:
        return denoiser.latents_in(host.encode_images(vae, objective.spoil(images, draws))["samples"])

    return degraded


def _feature_distance(host: Host, name: str, decode: Decoder, denoiser: Any) -> Callable[[Tensor, Tensor], Tensor]:
    network = perceptual_network(host, name).to(denoiser.device)

    def distance(x0: Tensor, clean: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = network(decode(denoiser.latents_out(clean)).to(denoiser.device))
        return feature_distance(network(decode(denoiser.latents_out(x0)).to(denoiser.device)), wanted)

    return distance
