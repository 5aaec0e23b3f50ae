"""The methods by name: what a workflow and a job file call them, their settings and their maths."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from .adapters import LoraConfig
from .config import RunConfig, TrainingConfig, read
from .objectives.parts.registry import METHODS, Method, needing, of_group, register

__all__ = ["METHODS", "Method", "needing", "of_group", "read_config", "register"]
# Each file registers its method. Nodes list them in this order, whichever was imported first.
for _file in (
    "dmd2", "fdistill", "tdm", "di_star", "flow_matching", "few_shot", "align_prop", "spo", "flow_grpo", "dpo", "smpo",
    "mapo", "instarevive",
):  # fmt: skip
    _module = importlib.import_module(f".objectives.{_file}", __package__)
    for _name in [name for name, method in METHODS.items() if method.objective.__module__ == _module.__name__]:
        METHODS[_name] = METHODS.pop(_name)


def read_config(values: Mapping[str, Any]) -> RunConfig:
    """A run's configuration from JSON values as `RunConfig.to_json` gives them. ValueError names what is wrong."""
    unknown = sorted({str(k)[:80] for k in values} - {"method", "objective", "training", "lora"})
    if unknown:
        raise ValueError(f"{unknown[0]} is not part of a run; it has method, objective, training and lora")
    name = values.get("method")
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r:.80}")
    training = read(TrainingConfig, values.get("training", {}), "training")
    if not METHODS[name].objective.of_samples and (training.slow_repeats > 1 or training.importance):
        able = ", ".join(key for key, method in METHODS.items() if method.objective.of_samples)
        raise ValueError(
            f"{name} does not learn from single images: set slow_repeats to 1 and importance to 0, or choose {able}"
        )
    return RunConfig(
        name,
        read(METHODS[name].config, values.get("objective", {}), "objective"),
        training,
        read(LoraConfig, values.get("lora", {}), "lora"),
    )
