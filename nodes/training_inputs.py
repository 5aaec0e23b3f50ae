"""The inputs that trainers share, and those of each method; their order is an interface, new ones go last."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..hosts.api import host, io
from ..trainers.adapters import LoraConfig
from ..trainers.config import TrainingConfig

NOTHING = "none"
_LORA = [f.name for f in dataclasses.fields(LoraConfig)]
_TRAINING = [f.name for f in dataclasses.fields(TrainingConfig)]


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


def _fake_rank() -> Any:
    return io.Int.Input(
        "fake_rank",
        default=0,
        min=0,
        max=1024,
        advanced=True,
        tooltip=("Rank of the fake score, which methods with one train beside the student; 0 takes the LoRA's."),
    )


def _prompts() -> Any:
    return io.String.Input(
        "prompts",
        default="",
        multiline=True,
        tooltip=("One prompt in each line, a few hundred varied ones if you can. Empty when `positive` is connected."),
    )


def common_inputs(name: str, steps: int, rate: float, rank: int, fake: bool = True, prompts: bool = True) -> list:
    """How a run goes, whatever is learnt; the first few are what most users set."""
    return [
        *([_prompts()] if prompts else []),
        io.String.Input(
            "name",
            default=name,
            tooltip=("Name of the LoRA and of the run. A run of this name that was stopped goes on where it was."),
        ),
        # A method's own "steps" are calls of the student; this name tells them apart on the node.
        io.Int.Input(
            "steps",
            display_name="training steps",
            default=steps,
            min=1,
            max=1_000_000,
            tooltip="Steps of the optimiser.",
        ),
        io.Int.Input(
            "batch_size", default=4, min=1, max=1024, tooltip="Samples on the GPU at once. Lower it when memory ends."
        ),
        io.Float.Input(
            "learning_rate", default=rate, min=0.0, max=1.0, step=1e-7, round=1e-9, tooltip="Peak rate of the student."
        ),
        io.Int.Input("rank", default=rank, min=1, max=1024, tooltip="Size of the LoRA."),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=2**64 - 1,
            control_after_generate=False,
            tooltip="The same seed trains the same LoRA.",
        ),
        io.Boolean.Input(
            "gradient_checkpointing", default=True, tooltip="Computes blocks twice and needs far less memory."
        ),
        io.Int.Input(
            "preview_every",
            default=50,
            min=0,
            max=1_000_000,
            tooltip="Steps between previews from fixed seeds (rough ones without `vae`); 0 for none.",
        ),
        io.Int.Input("previews", default=4, min=0, max=64, advanced=True, tooltip="Pictures in a preview."),
        io.Int.Input(
            "accumulation",
            default=1,
            min=1,
            max=4096,
            advanced=True,
            tooltip="Batches to one step: 4 batches of 1 learn as 1 batch of 4.",
        ),
        io.Float.Input(
            "noise_scale_target",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.01,
            advanced=True,
            tooltip=(
                "Above 0, accumulation grows while the gradient's noise is this many times its size (AdAdaGrad's eta)."
            ),
        ),
        io.Int.Input(
            "accumulation_cap",
            default=16,
            min=1,
            max=4096,
            advanced=True,
            tooltip="The most that accumulation grows to.",
        ),
        io.Combo.Input(
            "decay",
            options=["constant", "linear", "cosine"],
            default="constant",
            advanced=True,
            tooltip="Course of the learning rate after the warm-up.",
        ),
        io.Int.Input("warmup", default=20, min=0, max=1_000_000, advanced=True, tooltip="Steps of rising rate."),
        io.Combo.Input(
            "optimiser",
            options=["adamw", "adamw8bit", "adafactor", "prodigy"],
            default="adamw",
            advanced=True,
            tooltip="adamw8bit (needs bitsandbytes or torchao) saves three quarters of the optimiser's memory, "
            "adafactor nearly all of it. prodigy (needs prodigyopt) finds the learning rate by itself: "
            "set learning_rate to 1.",
        ),
        io.Float.Input(
            "weight_decay", default=0.01, min=0.0, max=1.0, step=0.001, advanced=True, tooltip="AdamW's weight decay."
        ),
        io.Float.Input(
            "max_grad_norm",
            default=1.0,
            min=0.0,
            max=1e6,
            step=0.1,
            advanced=True,
            tooltip="Longest gradient; 0 leaves it as it is.",
        ),
        io.Float.Input(
            "ema",
            default=0.0,
            min=0.0,
            max=0.99999,
            step=0.001,
            round=1e-5,
            advanced=True,
            tooltip=("Above 0 the LoRA is a running average of the weights: 0.99 looks back about a hundred steps."),
        ),
        io.Combo.Input(
            "precision",
            options=["auto", "fp32", "bf16"],
            default="auto",
            advanced=True,
            tooltip="Arithmetic of the network; adapters are always fp32. auto: as ComfyUI samples, but never in fp16.",
        ),
        io.Float.Input(
            "prompt_dropout",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip=(
                "Share of samples that see the empty prompt, so that guidance keeps working. 0.1 is usual for styles."
            ),
        ),
        io.Float.Input(
            "alpha",
            default=0.0,
            min=0.0,
            max=4096.0,
            step=0.5,
            advanced=True,
            tooltip="The LoRA learns at alpha / rank; 0 takes alpha = rank.",
        ),
        io.String.Input(
            "targets",
            default="*",
            advanced=True,
            tooltip="Layers to train: patterns of their names with commas between, such as *attn*, *.mlp.* and so on.",
        ),
        io.String.Input("exclude", default="", advanced=True, tooltip="Patterns of layers to leave out."),
        io.Boolean.Input("convolutions", default=True, advanced=True, tooltip="Train convolutions too."),
        io.Float.Input(
            "dropout", default=0.0, min=0.0, max=0.9, step=0.01, advanced=True, tooltip="Dropout before the LoRA."
        ),
        *([_fake_rank()] if fake else []),
        io.Combo.Input(
            "start_from",
            options=[NOTHING, *host.lora_names()],
            default=NOTHING,
            advanced=True,
            tooltip="A LoRA in models/loras that the student begins as.",
        ),
        io.Int.Input(
            "save_every",
            default=250,
            min=0,
            max=1_000_000,
            advanced=True,
            tooltip="Steps between saves of the whole run; it is saved on cancel and on error too.",
        ),
        io.Float.Input(
            "save_minutes",
            default=10.0,
            min=0.0,
            max=10_000.0,
            step=1.0,
            advanced=True,
            tooltip="Minutes between saves.",
        ),
        io.Int.Input(
            "keep", default=3, min=0, max=1000, advanced=True, tooltip="LoRA checkpoints kept in the run's folder."
        ),
    ]


def image_inputs() -> list:
    """How often single images or pairs come, for methods whose loss is a mean over them."""
    return [
        io.Int.Input(
            "slow_repeats",
            default=1,
            min=1,
            max=16,
            advanced=True,
            tooltip="Above 1, images that are learnt slowly come so often in each round; 2 is USEFUL's. 1 is off.",
        ),
        io.Int.Input(
            "slow_after",
            default=100,
            min=1,
            max=1_000_000,
            advanced=True,
            tooltip="slow_repeats: steps of the short run that finds them; about a tenth of the training.",
        ),
        io.Float.Input(
            "importance",
            default=0.0,
            min=0.0,
            max=0.5,
            step=0.05,
            advanced=True,
            tooltip=(
                "Share of draws that go to images from which more is learnt, each at a weight that makes up for it. 0 "
                "draws them in turn."
            ),
        ),
    ]


def offload_input() -> Any:
    """Where the frozen base lies while it does not compute."""
    return io.String.Input(
        "offload",
        default="auto",
        optional=True,  # prompts that scripts wrote before it existed go on
        advanced=True,
        tooltip=(
            "Blocks of the base that wait in the computer's memory and come to the GPU to compute: auto when they do "
            "not all fit, none, or how many. Needs gradient_checkpointing; changes no result."
        ),
    )


def training_settings(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parts of a run's configuration that common inputs spell."""
    return {
        "training": {k: values[k] for k in _TRAINING if k in values},
        "lora": {k: values[k] for k in _LORA if k in values},
    }
