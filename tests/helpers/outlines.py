"""Models of diffusers' classes from their configurations alone, and runs on them: what a dry run is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from retort.hosts.headless.families import FLUX, SD3, SDXL, Family, as_model, bare_module, coordinates
from retort.hosts.headless.model import Model
from retort.hosts.training.assembly import add_adapters, encode
from retort.trainers.adapters import LoraConfig
from retort.trainers.config import RunConfig, TrainingConfig
from retort.trainers.dataset import Dataset
from retort.trainers.loop import Trainer
from retort.trainers.methods import METHODS

FLUX_SMALL = {
    "in_channels": 64, "num_layers": 4, "num_single_layers": 5, "attention_head_dim": 128, "num_attention_heads": 2,
    "joint_attention_dim": 64, "pooled_projection_dim": 32, "guidance_embeds": True, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip


def model_of(family: Family, config: dict[str, Any], real: bool = False) -> Model:
    """A MODEL of a configuration; real: with random weights in fp32."""
    import diffusers

    schedule, path, prediction = coordinates(family, {}, config)
    made = getattr(diffusers, family.diffusers_class)

    def build() -> Any:
        torch.manual_seed(0)
        return made(**config)

    return as_model(family, build, schedule, path, prediction, build if real else lambda: bare_module(family, config))


def run_config(method: str, training: dict[str, Any] | None = None, rank: int = 4, **objective: Any) -> RunConfig:
    """Settings of a run."""
    settings = {"batch_size": 1, "gradient_checkpointing": True} | (training or {})
    return RunConfig(method, METHODS[method].config(**objective), TrainingConfig(**settings), LoraConfig(rank))


def trainer_of(config: RunConfig, dataset: Dataset) -> Any:
    """What makes a run's trainer on a denoiser."""

    def make(denoiser: Any) -> Trainer:
        objective = METHODS[config.method].objective(config.objective, denoiser)
        add_adapters(denoiser, config, objective, None)
        return Trainer(denoiser, objective, encode(denoiser, dataset), config, Path("nowhere"))

    return make


def dataset_of(shape: tuple[int, ...], tokens: tuple[int, int], pooled: int) -> Dataset:
    """One picture and one prompt."""
    entry = torch.zeros(1, *tokens), {"pooled_output": torch.zeros(1, pooled)}
    return Dataset([entry], ["a"], entry, [torch.zeros(shape)])


__all__ = ["FLUX", "SD3", "SDXL", "FLUX_SMALL", "dataset_of", "model_of", "run_config", "trainer_of"]
