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

from ..sampling.settings import Settings, setting
from .adapters import LoraConfig
from .optimisers import Optimiser

Kind = TypeVar("Kind")
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
class TrainingConfig(Settings):
    """How the loop runs, whatever the objective; see `order` and `slow` for how often samples come, `offload` for where
    the base lies, `accumulation` for the norm test by which steps grow.
    """

    steps: int = setting(
        1000, 1, MOST_STEPS, help="Steps of the optimiser.",
        page="Steps of the optimiser. Raise it to go on with a finished run.",
    )
    batch_size: int = setting(4, 1, 4096, help="Samples on the GPU at once. Lower it when memory ends.")
    accumulation: int = setting(
        1, 1, 4096, advanced=True, help="Batches to one step: 4 batches of 1 learn as 1 batch of 4."
    )
    noise_scale_target: float = setting(
        0.0, 0, 100, step=0.01, advanced=True,
        help="Above 0, accumulation grows while the gradient's noise is this many times its size (AdAdaGrad's eta).",
        page="Above 0 accumulation grows while the gradient's noise is more than this many times its size. Needs "
        "accumulation of at least 2.",
    )
    accumulation_cap: int = setting(16, 1, 4096, advanced=True, help="The most that accumulation grows to.")
    learning_rate: float = setting(
        1e-4, 0, 1, step=1e-7, round=1e-9, help="Peak rate of the student.",
        page="Peak rate of the student. 1e-4 suits LoRAs of large models; lower it when pictures fall apart.",
    )
    decay: Decay = setting(
        "constant", advanced=True, help="Course of the learning rate after the warm-up.",
        page="Course of the rate after the warm-up. With linear and cosine, `steps` cannot be changed later.",
    )
    warmup: int = setting(20, 0, MOST_STEPS, advanced=True, help="Steps of rising rate.")
    optimiser: Optimiser = setting(
        "adamw", advanced=True,
        help="adamw8bit (needs bitsandbytes or torchao) saves three quarters of the optimiser's memory, adafactor "
        "nearly all of it. prodigy (needs prodigyopt) finds the learning rate by itself: set learning_rate to 1.",
    )
    beta1: float = setting(0.9, 0, 0.9999, help="How much of the running mean of gradients AdamW keeps.")
    beta2: float = setting(0.99, 0, 0.999999, help="How much of the running mean of their squares it keeps.")
    weight_decay: float = setting(0.01, 0, 1, step=0.001, advanced=True, help="AdamW's weight decay.")
    max_grad_norm: float = setting(
        1.0, 0, 1e6, step=0.1, advanced=True, help="Longest gradient; 0 leaves it as it is.",
        page="Each adapter's gradient is clipped to this length; 0 leaves it.",
    )
    ema: float = setting(
        0.0, 0, 0.99999, step=0.001, round=1e-5, advanced=True,
        help="Above 0 the LoRA is a running average of the weights: 0.99 looks back about a hundred steps.",
        page="Above 0 the LoRA, and the previews, are a running average of the weights; 0.99 looks back about a "
        "hundred steps.",
    )
    precision: Precision = setting(
        "auto", advanced=True,
        help="Arithmetic of the network; adapters are always fp32. auto: as ComfyUI samples, but never in fp16.",
        page="Of the network's arithmetic. auto computes as ComfyUI samples; a model that it holds in fp16, in which "
        "gradients overflow, is taken in bf16 where the card has it, else in fp32. Adapters are always fp32.",
    )
    gradient_checkpointing: bool = setting(
        True, help="Computes blocks twice and needs far less memory.",
        page="Computes blocks twice and keeps far fewer activations.",
    )
    prompt_dropout: float = setting(
        0.0, 0, 1, step=0.01, advanced=True,
        help="Share of samples that see the empty prompt, so that guidance keeps working. 0.1 is usual for styles.",
    )
    seed: int = setting(0, 0, 2**64 - 1, help="The same seed trains the same LoRA.")
    save_every: int = setting(
        250, 0, MOST_STEPS, advanced=True,
        help="Steps between saves of the whole run; it is saved on cancel and on error too.",
    )
    save_minutes: float = setting(
        10.0, 0, 1e5, step=1.0, advanced=True, help="Minutes between saves.",
        page="Minutes between saves, whichever comes first.",
    )
    keep: int = setting(3, 0, 1000, advanced=True, help="LoRA checkpoints kept in the run's folder.")
    preview_every: int = setting(
        50, 0, MOST_STEPS,
        help="Steps between previews from fixed seeds, also before the first and after the last step (rough ones "
        "without `vae`); 0 for none.",
        page="Steps between pictures from fixed noise, also before the first and after the last step, shown on the "
        "node and kept in the run's folder; 0 for none.",
    )
    previews: int = setting(4, 0, 64, advanced=True, help="Pictures in a preview.")
    fake_rank: int = setting(
        0, 0, 1024, advanced=True,
        help="Rank of the fake score, which methods with one train beside the student; 0 takes the LoRA's.",
    )
    slow_repeats: int = setting(
        1, 1, 16, advanced=True,
        help="Above 1, images that are learnt slowly come so often in each round; 2 is USEFUL's. 1 is off.",
        page="Above 1, images or pairs that are learnt slowly come so often in each round, after a short run has found "
        "them; see *Train LoRA on Images*. 1 is off.",
    )
    slow_after: int = setting(
        100, 1, MOST_STEPS, advanced=True,
        help="slow_repeats: steps of the short run that finds them; about a tenth of the training.",
        page="Steps of that short run, which is thrown away; about a tenth of `steps`.",
    )
    importance: float = setting(
        0.0, 0, 0.5, step=0.05, advanced=True,
        help="Share of draws that go to images from which more is learnt, each at a weight that makes up for it. 0 "
        "draws them in turn.",
        page="Share of draws that go to images or pairs from which more is learnt, each at a weight that makes up for "
        "it; see *Train LoRA on Images*. 0 draws all in turn.",
    )
    offload: str = setting(
        AUTO, advanced=True,
        help="Blocks of the base that wait in the computer's memory and come to the GPU to compute: auto when they do "
        "not all fit, none, or how many. Needs gradient_checkpointing; changes no result.",
        page="Blocks of the base that wait in host memory and come to the device to compute, one while another "
        "computes: *auto*, the fewest with which the run fits (none where other idle parts of it can wait instead; "
        "these, too, where all blocks are not enough); *none*; or how many. Needs gradient_checkpointing. Results are "
        "the same to the bit, and a run may go on with another value.",
    )

    sound_weight: float = setting(
        1.0, 0, 1000, step=0.1, advanced=True,
        help="Video with sound: how much the sound's mean error counts beside the video's. Else it has no meaning.",
        page="Video with sound (LTX-2, MiniMax-H3): how much the mean error of the sound counts beside the video's. 0 "
        "trains the video alone, as if the sound had no error. It has no meaning for other latents.",
        remedy="1 counts both alike, 0 trains the video alone",
    )

    def check(self) -> None:
        """See the base."""
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


def read(kind: type[Kind], values: Any, where: str) -> Kind:
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
