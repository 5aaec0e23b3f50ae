"""The inputs that trainers share; their order is an interface, new ones go last."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from ..hosts.api import host, io
from ..sampling.settings import declared
from ..trainers.adapters import LoraConfig
from ..trainers.config import TrainingConfig
from ..trainers.methods import METHODS
from ..trainers.objectives.flow_matching import FlowMatchingConfig
from .inputs import file_input, input_of, inputs_of

NOTHING = "none"
# Of a run's inputs, which saved workflows count on. What came later stands behind: `image_inputs`, `late_inputs`.
ORDER = (
    "prompts", "name", "steps", "batch_size", "learning_rate", "rank", "seed", "gradient_checkpointing",
    "preview_every", "previews", "accumulation", "noise_scale_target", "accumulation_cap", "decay", "warmup",
    "optimiser", "weight_decay", "max_grad_norm", "ema", "precision", "prompt_dropout", "alpha", "targets", "exclude",
    "convolutions", "dropout", "fake_rank", "start_from", "save_every", "save_minutes", "keep",
)  # fmt: skip
_LORA = [f.name for f in dataclasses.fields(LoraConfig)]
_TRAINING = [f.name for f in dataclasses.fields(TrainingConfig)]
SETTINGS = (*_TRAINING, *_LORA)
# Of methods, but behind a run's inputs, since saved workflows know widgets by their place.
EXPERTS = ("expert", "boundary")


def sources() -> list:
    """Model and data."""
    return [
        io.Model.Input("model", tooltip="The model to train for; LoRAs that it carries become part of the base."),
        io.Clip.Input("clip", optional=True, tooltip="Text encoder for the prompts typed below."),
        io.Conditioning.Input(
            "positive", optional=True, tooltip="Encoded prompts instead of typed ones, as Make Training Dataset gives."
        ),
        io.Conditioning.Input(
            "negative",
            optional=True,
            tooltip="What guidance compares with. Not connected: the empty prompt, where `clip` is.",
        ),
        io.Latent.Input(
            "latents",
            optional=True,
            tooltip="Images as latents, one for each prompt; an empty latent only gives the size to train at.",
        ),
        io.Image.Input("images", optional=True, tooltip="Images instead of latents, one for each prompt; needs `vae`."),
        io.Vae.Input("vae", optional=True, tooltip="Encodes images and decodes previews."),
    ]


def common_inputs(name: str, steps: int, rank: int, fake: bool = True, prompts: bool = True) -> list:
    """How a run goes, whatever is learnt; the first few are what most users set."""
    own = [
        io.String.Input(
            "prompts",
            default="",
            multiline=True,
            tooltip=(
                "One prompt in each line, a few hundred varied ones if you can. Empty when `positive` is connected."
            ),
        ),
        io.String.Input(
            "name",
            default=name,
            tooltip="Name of the LoRA and of the run. A run of this name that was stopped goes on where it was.",
        ),
        file_input(
            "start_from",
            [NOTHING, *host.lora_names()],
            "A LoRA in models/loras that the student begins as.",
            default=NOTHING,
            advanced=True,
        ),
    ]
    # A method's own "steps" are calls of the student; this name tells them apart on the node.
    declared = inputs_of(
        TrainingConfig,
        steps={"default": steps, "display_name": "training steps"},
        seed={"control_after_generate": False},
    )
    by_name = {one.id: one for one in (*own, *declared, *inputs_of(LoraConfig, rank=rank))}
    left_out = {*(() if prompts else ("prompts",)), *(() if fake else ("fake_rank",))}
    return [by_name[each] for each in ORDER if each not in left_out]


def method_input(methods: Iterable[str]) -> Any:
    """The choice of a method with only that method's settings."""
    return io.DynamicCombo.Input(
        "method",
        options=[io.DynamicCombo.Option(name, inputs_of(METHODS[name].config)) for name in methods],
        tooltip="How the student is taught; the help page compares them.",
    )


def image_inputs() -> list:
    """How often single images or pairs come, for methods whose loss is a mean over them."""
    return [one for one in inputs_of(TrainingConfig) if one.id in ("slow_repeats", "slow_after", "importance")]


def late_inputs(sound: bool = True, experts: bool = False) -> list:
    """Where the frozen base lies while it does not compute; what a video's sound counts, and which of two networks is
    trained, where a method asks."""
    by_name = {one.id: one for one in inputs_of(TrainingConfig)}
    own = [by_name[name] for name in ("offload", *(["sound_weight"] if sound else []))]
    return own + [input_of(declared(FlowMatchingConfig)[name]) for name in EXPERTS if experts]


def other_expert_input() -> Any:
    """The network beside the one that is trained."""
    return io.Model.Input(
        "other_expert",
        optional=True,
        tooltip="Wan 2.2 A14B: the other of its two networks; previews are then sampled by both.",
    )


def reference_input() -> Any:
    """What an edit model is shown."""
    return io.Latent.Input(
        "references",
        optional=True,
        tooltip="Edit models: the picture before, encoded by the VAE, for each sample in turn, or one for all.",
    )


def training_settings(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parts of a run's configuration that common inputs spell."""
    return {
        "training": {k: values[k] for k in _TRAINING if k in values},
        "lora": {k: values[k] for k in _LORA if k in values},
    }
