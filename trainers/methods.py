"""The methods by name: what a workflow and a job file call them, their settings and their maths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .adapters import LoraConfig
from .config import RunConfig, TrainingConfig, read
from .objectives.align_prop import AlignProp, AlignPropConfig
from .objectives.di_star import DIStar, DIStarConfig
from .objectives.dmd2 import DMD2, DMD2Config
from .objectives.dpo import DPO, DPOConfig
from .objectives.fdistill import FDistill, FDistillConfig
from .objectives.few_shot import FewShot, FewShotConfig
from .objectives.flow_grpo import FlowGRPO, FlowGRPOConfig
from .objectives.flow_matching import FlowMatching, FlowMatchingConfig
from .objectives.instarevive import InstaRevive, InstaReviveConfig
from .objectives.mapo import MaPO, MaPOConfig
from .objectives.smpo import SmPO, SmPOConfig
from .objectives.spo import SPO, SPOConfig
from .objectives.tdm import TDM, TDMConfig


@dataclass(frozen=True)
class Method:
    """A method's settings and maths. reward: whether it takes one, and whether that must be differentiable.

    pictures: whether it learns from pictures that its `spoil` degrades, and the engine encodes, in every step.
    images: whether its loss is a mean over images or pairs, so that some may come more often. group: what it is for,
    by which nodes offer it.
    """

    config: type
    objective: type
    group: Literal["distillation", "images", "reward", "preference", "restoration"]
    reward: Literal["none", "any", "differentiable"] = "none"
    pictures: bool = False
    images: bool = False


METHODS: dict[str, Method] = {
    "dmd2": Method(DMD2Config, DMD2, "distillation"),
    "f_distill": Method(FDistillConfig, FDistill, "distillation"),
    "tdm": Method(TDMConfig, TDM, "distillation"),
    "di_star": Method(DIStarConfig, DIStar, "distillation", "differentiable"),
    "flow": Method(FlowMatchingConfig, FlowMatching, "images", images=True),
    "few_shot": Method(FewShotConfig, FewShot, "images", images=True),
    "align_prop": Method(AlignPropConfig, AlignProp, "reward", "differentiable"),
    "spo": Method(SPOConfig, SPO, "reward", "any"),
    "flow_grpo": Method(FlowGRPOConfig, FlowGRPO, "reward", "any"),
    "dpo": Method(DPOConfig, DPO, "preference", images=True),
    "smpo": Method(SmPOConfig, SmPO, "preference", images=True),
    "mapo": Method(MaPOConfig, MaPO, "preference", images=True),
    "instarevive": Method(InstaReviveConfig, InstaRevive, "restoration", pictures=True),
}
# These learn from nothing else; DI* also does without.
NEED_REWARD = ("align_prop", "spo", "flow_grpo")


def of_group(*groups: str) -> list[str]:
    """The methods of these groups, in the order in which nodes list them."""
    return [name for name, method in METHODS.items() if method.group in groups]


def read_config(values: Mapping[str, Any]) -> RunConfig:
    """A run's configuration from JSON values as `RunConfig.to_json` gives them. ValueError names what is wrong."""
    unknown = sorted({str(k)[:80] for k in values} - {"method", "objective", "training", "lora"})
    if unknown:
        raise ValueError(f"{unknown[0]} is not part of a run; it has method, objective, training and lora")
    name = values.get("method")
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r:.80}")
    training = read(TrainingConfig, values.get("training", {}), "training")
    if not METHODS[name].images and (training.slow_repeats > 1 or training.importance):
        able = ", ".join(key for key, method in METHODS.items() if method.images)
        raise ValueError(
            f"{name} does not learn from single images: set slow_repeats to 1 and importance to 0, or choose {able}"
        )
    return RunConfig(
        name,
        read(METHODS[name].config, values.get("objective", {}), "objective"),
        training,
        read(LoraConfig, values.get("lora", {}), "lora"),
    )
