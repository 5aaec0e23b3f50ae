"""A LoRA file's tensor names taken apart: which layer each belongs to, and what it is there, in one spelling.

Kohya, PEFT, diffusers, LyCORIS and their successors spell the same few things in a dozen ways. `split` tells them in
the spelling that ComfyUI's loaders have in common: lora_down.weight, lora_up.weight, alpha, dora_scale, diff, diff_b.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

DOWN, UP, MID = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
ALPHA, DORA, DIFF, BIAS, SET, SHAPE = "alpha", "dora_scale", "diff", "diff_b", "set_weight", "reshape_weight"
# PEFT's, over the norm of the weight with the LoRA; a dora_scale is over that of the weight without it.
MAGNITUDE = "magnitude"
TEXT = ("lora_te", "text_encoder", "text_encoders.", "te1.", "te2.")

_HALVES = {"A": DOWN, "down": DOWN, "B": UP, "up": UP, "mid": MID}
# diffusers' first scripts kept LoRAs in attention processors: `attn1.processor.to_out_lora.up.weight`.
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_\w+?)_lora\.(down|up)\.weight")
_PAIRS = (
    # PEFT writes its adapter's name between: `lora_A.default.weight`.
    re.compile(r"(.+)\.lora_(A|B|down|up|mid)(?:\.\w+)?\.weight"),
    re.compile(r"(.+)\.lora_(A|B)"),
    re.compile(r"(.+?)[._]lora\.(down|up)\.weight"),
    re.compile(r"(.+)\.lora_linear_layer\.(down|up)\.weight"),
)
# The bias of PEFT's second half is that of the layer, since nothing comes after it.
_BIAS = re.compile(r"(.+)\.lora_(?:B|up)(?:\.\w+)?\.bias")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.\w+){0,2}")
_OWN = re.compile(
    r"(.+)\.(alpha|dora_scale|diff|diff_b|set_weight|reshape_weight|w_norm|b_norm|rescale|oft_diag|"
    r"(?:hada|lokr|oft)_\w+|[ab][12]\.weight)"
)
# What stands before a layer's own name, in any order and number.
_PREFIXES = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "module.",
    "_orig_mod.", "pipe.dit.", "dit.", "net.", "model.",
    "lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_",
)  # fmt: skip

T = TypeVar("T")


def split(key: str) -> tuple[str, str] | None:
    """(stem, what it is there) of a tensor's name; None for one that is no part of a LoRA or its kin."""
    if old := _PROCESSOR.fullmatch(key):
        return f"{old[1]}.{'to_out.0' if old[2] == 'to_out' else old[2]}", _HALVES[old[3]]
    for pattern in _PAIRS:
        if found := pattern.fullmatch(key):
            return found[1], _HALVES[found[2]]
    if found := _BIAS.fullmatch(key):
        return found[1], BIAS
    if found := _MAGNITUDE.fullmatch(key):
        return found[1], MAGNITUDE
    if found := _OWN.fullmatch(key):
        return found[1], found[2]
    return None


def stems(state: Mapping[str, T]) -> tuple[dict[str, dict[str, tuple[str, T]]], list[str]]:
    """(stem -> what -> (name in the file, value), names that are no part of a LoRA)."""
    found: dict[str, dict[str, tuple[str, T]]] = {}
    rest = []
    for key, value in state.items():
        parts = split(key)
        if parts is None or parts[1] in found.get(parts[0], {}):
            rest.append(key)
        else:
            found.setdefault(parts[0], {})[parts[1]] = key, value
    return found, rest


def is_text(name: str) -> bool:
    """Whether a tensor or stem belongs to a text encoder."""
    return name.startswith(TEXT)


def bare(stem: str) -> Iterator[str]:
    """A stem, and what remains of it as prefixes are taken away, one after another."""
    yield stem
    while (prefix := next((p for p in _PREFIXES if stem.startswith(p)), None)) is not None:
        stem = stem.removeprefix(prefix)
        yield stem


def flat(name: str) -> str:
    """A name as kohya's files have it."""
    return name.replace(".", "_")


def example(names: Iterable[str]) -> str:
    """One of some names, for a message."""
    return f"{min(names, default='')!r:.100}"


def shown(names: Iterable[str], most: int = 3) -> str:
    """The first few of some names, for a message."""
    ordered = sorted(names)
    text = ", ".join(repr(name)[:100] for name in ordered[:most])
    return text if len(ordered) <= most else f"{text} and {len(ordered) - most} more"
