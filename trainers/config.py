"""What a run is told: frozen settings, and the strict reading of them from a stranger's JSON."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, TypeVar, get_args, get_origin

from .adapters import LoraConfig
from .optimisers import Optimiser

Settings = TypeVar("Settings")
Decay = Literal["constant", "linear", "cosine"]
Precision = Literal["auto", "fp32", "bf16"]

# Of the training's settings these may differ between a run and its continuation: they change no gradient. A method's
# own `steps` are the student's grid, and may not.
FREE = (
    "steps", "save_every", "save_minutes", "preview_every", "previews", "gradient_checkpointing", "keep", "offload",
)  # fmt: skip
AUTO, NONE = "auto", "none"  # of offload
MOST_STEPS = 10_000_000
# A rate meant for AdamW would stop Prodigy, whose own estimate stands beside it.
LEAST_PRODIGY = 0.05


@dataclass(frozen=True)
class TrainingConfig:
    """How the loop runs, whatever the objective.

    steps: optimiser steps. batch_size: samples on the device at once. accumulation: batches to one step.
    noise_scale_target: eta of the norm test that lets accumulation grow (0 = plain accumulation), up to
    accumulation_cap. learning_rate: the student's peak; decay: its course after `warmup` steps. max_grad_norm: to which
    each player's gradient is clipped (0 = off). ema: rate of the averaged weights, which become the LoRA (0 = off).
    precision: auto is the host's own, but never fp16. prompt_dropout: share of samples that see the empty prompt.
    save_every (steps), save_minutes: whichever comes first (0 = never). keep: how many LoRA checkpoints stay.
    preview_every: steps (0 = never); previews: how many pictures. fake_rank: rank of the fake score's adapter (0 = the
    student's). slow_repeats: how often images come in each lap that are still learnt badly after slow_after steps (1 =
    as often as others; see `slow`). importance: share of draws by how much a sample teaches (0 = in turn; see `order`).
    offload: blocks of the base that wait in host memory, "none", a number, or "auto" for as many as the memory asks
    (see `offload`).
    """

    steps: int = 1000
    batch_size: int = 4
    accumulation: int = 1
    noise_scale_target: float = 0.0
    accumulation_cap: int = 16
    learning_rate: float = 1e-4
    decay: Decay = "constant"
    warmup: int = 20
    optimiser: Optimiser = "adamw"
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema: float = 0.0
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    prompt_dropout: float = 0.0
    seed: int = 0
    save_every: int = 500
    save_minutes: float = 10.0
    keep: int = 3
    preview_every: int = 100
    previews: int = 4
    fake_rank: int = 0
    slow_repeats: int = 1
    slow_after: int = 100
    importance: float = 0.0
    offload: str = AUTO

    def __post_init__(self) -> None:
        whole = {
            "steps": (1, MOST_STEPS), "batch_size": (1, 4096), "accumulation": (1, 4096),
            "accumulation_cap": (1, 4096), "warmup": (0, MOST_STEPS), "save_every": (0, MOST_STEPS),
            "keep": (0, 1000), "preview_every": (0, MOST_STEPS), "previews": (0, 64), "fake_rank": (0, 1024),
            "seed": (0, 2**64 - 1), "slow_repeats": (1, 16), "slow_after": (1, MOST_STEPS),
        }  # fmt: skip
        numbers = {
            "noise_scale_target": (0, 100), "learning_rate": (0, 1), "beta1": (0, 0.9999), "beta2": (0, 0.999999),
            "weight_decay": (0, 1), "max_grad_norm": (0, 1e6), "ema": (0, 0.99999), "prompt_dropout": (0, 1),
            "save_minutes": (0, 1e5), "importance": (0, 0.5),
        }  # fmt: skip
        for name, (low, high) in {**whole, **numbers}.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"{name} must be between {low} and {high}, got {value!r}")
        for name, kind in (("decay", Decay), ("optimiser", Optimiser), ("precision", Precision)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}")
        self._check_offload()
        if self.optimiser == "prodigy" and self.learning_rate < LEAST_PRODIGY:
            raise ValueError(
                f"learning_rate is {self.learning_rate!r}, and optimiser prodigy multiplies with it the rate that it "
                "finds by itself: set learning_rate to 1"
            )
        if self.noise_scale_target and self.accumulation < 2:
            raise ValueError("noise_scale_target compares the micro-batches of a step: set accumulation to at least 2")
        if self.accumulation_cap < self.accumulation:
            raise ValueError(
                f"accumulation_cap {self.accumulation_cap} is below accumulation {self.accumulation}: raise it"
            )

    def _check_offload(self) -> None:
        offload = self.offload
        if offload in (AUTO, NONE):
            return
        if not (offload.isascii() and offload.isdigit() and len(offload) <= 5):
            raise ValueError(f"offload must be auto, none or a number of blocks such as 20, got {offload!r:.40}")
        if int(offload) and not self.gradient_checkpointing:
            raise ValueError(
                f"offload {offload} needs gradient_checkpointing: a block's weights leave the device before the "
                "backward pass, which computes the block again when they are back; turn it on, or set offload to none"
            )

    def rate(self, step: int) -> float:
        """The learning rate at a step over its peak: linear warm-up, then the decay to zero at the last step."""
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.decay == "constant":
            return warm
        progress = min(1.0, max(0, step - self.warmup) / max(1, self.steps - self.warmup))
        return warm * (1 - progress if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes, except its data and its base model."""

    method: str
    objective: Any
    training: TrainingConfig = field(default_factory=TrainingConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def to_json(self) -> dict[str, Any]:
        """The configuration as JSON values; `read` on each part gives it back."""
        return {
            "method": self.method,
            "objective": dataclasses.asdict(self.objective),
            "training": dataclasses.asdict(self.training),
            "lora": dataclasses.asdict(self.lora),
        }


def differences(old: Mapping[str, Any], new: Mapping[str, Any], where: str = "") -> list[str]:
    """The settings that forbid `new` from continuing `old`, each as "field: old -> new"."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{where}{key}.")
        elif a != b and not (where == "training." and key in FREE):
            found.append(f"{where}{key}: {a!r} -> {b!r}")
    # A decaying rate depends on the number of steps, so there the run would differ from an uninterrupted one.
    if where == "training." and old.get("steps") != new.get("steps") and old.get("decay") != "constant":
        found.append(f"{where}steps: {old.get('steps')!r} -> {new.get('steps')!r} (decay is {old.get('decay')})")
    return found


def read(kind: type[Settings], values: Any, where: str) -> Settings:
    """A frozen dataclass from JSON values. ValueError names the field that is unknown, missing or of a wrong type."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be an object with names and values, got {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = [str(name)[:80] for name in values if name not in fields]
    if unknown:
        raise ValueError(f"{where}.{unknown[0]} is not a setting; {where} has {', '.join(fields)}")
    hints = _hints(kind)  # type: ignore[arg-type]
    given = {name: _typed(hints[name], value, f"{where}.{name}") for name, value in values.items()}
    missing = [
        n for n, f in fields.items()
        if n not in given and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    if missing:
        raise ValueError(f"{where}.{missing[0]} is missing")
    try:
        return kind(**given)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


@lru_cache(maxsize=64)
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _typed(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{where} must be one of {', '.join(map(repr, get_args(hint)))}, got {value!r:.80}")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or len(value) > 100_000:
            raise ValueError(f"{where} must be a list")
        return tuple(_typed(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if isinstance(hint, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        return _typed(next(a for a in get_args(hint) if a is not type(None)), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < 2**63 else math.inf
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ValueError(f"{where} must be {hint.__name__}, got {value!r:.80}")
    return value
