"""A LoRA file's tensors at their places in a network, every one accounted for; and fused layers out of their parts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...files.errors import UsageError
from ...files.strangers import parse
from .lora_keys import (
    ALPHA,
    BIAS,
    DIFF,
    DORA,
    DOWN,
    MAGNITUDE,
    MID,
    SET,
    SHAPE,
    UP,
    example,
    is_text,
    shown,
    stems,
)  # fmt: skip
from .lora_places import Names, Place, Shape, seems_for

_ROWS = (UP, DORA, MAGNITUDE, DIFF, BIAS, SET)  # whose first axis is the layer's output
_LINEAR = {UP, DOWN, ALPHA, DORA, MAGNITUDE, DIFF, BIAS}

# MiniMax-H3's fused queries, keys and values under bare names, as DiffSynth-Studio saves what it trained. In MiniMax's
# own files their rows lie head by head (query, key and value of one, then of the next), in ComfyUI's apart; trained
# from either the names are the same.
_FUSED = re.compile(r"(?:token_refiner\.)?blocks\.\d+\.attn\.qkv_proj")
_HEAD = 128  # rows of one head's queries
_NAMED = "diffusion_model."

Alphas = Callable[[str, int], float | None]
"""(stem, rank) -> alpha where the file's tensors give none; None where nothing else does."""


@dataclass
class Piece:
    """What a file has for one place: tensors by what they are there, in the spelling of `lora_keys`."""

    stem: str
    place: Place
    tensors: dict[str, Tensor]
    keys: list[str]


@dataclass
class Reading:
    """pieces: at their places. left: names of other tensors -> why they have none. text: names of a text encoder's."""

    pieces: list[Piece] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    text: list[str] = field(default_factory=list)

    def told(self, what: str = "the LoRA") -> str:
        """A sentence on what of `what` is left out, empty where nothing is."""
        whys: dict[str, list[str]] = {}
        for name, why in self.left.items():
            whys.setdefault(why, []).append(name)
        parts = [f"{shown(names)}: {why}" for why, names in whys.items()]
        return f"{len(self.left)} tensors of {what} are left out ({'; '.join(parts)})" if parts else ""


def alphas_of(metadata: Mapping[str, str]) -> Alphas:
    """The alphas that diffusers writes into a file's metadata: PEFT's LoraConfig as JSON, prefixed by the model's name.

    Metadata that cannot be read say nothing.
    """
    text = metadata.get("lora_adapter_metadata")
    try:
        held = parse(text.encode(), finite=False) if text else {}
    except ValueError:
        held = {}
    values: dict[str, Any] = {k.rpartition(".")[2]: v for k, v in held.items()} if isinstance(held, dict) else {}
    alpha, patterns = values.get("lora_alpha"), values.get("alpha_pattern")
    rooted = values.get("use_rslora") is True

    def of(stem: str, rank: int) -> float | None:
        found = alpha
        if isinstance(patterns, dict):
            found = next((a for name, a in patterns.items() if stem == name or stem.endswith(f".{name}")), alpha)
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            return None
        return float(found) * (math.sqrt(rank) if rooted else 1.0)

    return of


def with_alphas(state: Mapping[str, Tensor], alphas: Alphas) -> dict[str, Tensor]:
    """A file's tensors, with the alphas that they lack."""
    made = dict(state)
    for stem, held in stems(state)[0].items():
        if DOWN in held and held[DOWN][1].ndim and ALPHA not in held and not is_text(stem):
            alpha = alphas(stem, len(held[DOWN][1]))
            if alpha is not None:
                made[f"{stem}.{ALPHA}"] = torch.tensor(alpha)
    return made


def read(state: Mapping[str, Tensor], names: Names, what: str = "the LoRA") -> Reading:
    """A file's tensors at their places; messages call it `what`.

    UsageError for a pair of which one half is missing, and where no tensor has a place: it says what the file seems to
    be for.
    """
    found, rest = stems(state)
    unclear = [stem for stem, held in found.items() if _is_unclear(stem, held)]
    if unclear:
        raise UsageError(
            f"the layer {unclear[0]} of {what} has a name that DiffSynth-Studio gives to rows in two orders: convert "
            "the file with `retort lora convert`, and --rows heads where it was trained on MiniMax's own files, --rows "
            "parts where on ComfyUI's"
        )
    reading = Reading(left=dict.fromkeys(rest, "no part of a LoRA"))
    taken: set[tuple[str, tuple[int, int] | None]] = set()
    for stem, held in found.items():
        keys = [key for key, _ in held.values()]
        if is_text(stem):
            reading.text += keys
            continue
        tensors = {what: value for what, (_, value) in held.items()}
        _refuse_halves(stem, tensors)
        place, why = _place(names, stem, tensors)
        if place is not None and (place.layer, place.rows) in taken:
            place, why = None, "the file has its layer twice"
        if place is not None and place.swapped and not tensors.keys() <= _LINEAR:
            place, why = None, "the model has its rows in another order, in which only plain LoRAs can be brought"
        if place is None:
            reading.left |= dict.fromkeys(keys, why)
            continue
        taken.add((place.layer, place.rows))
        bias = BIAS in held and held[BIAS][0].endswith(".bias")
        made = _normal(tensors, place, names.shapes[place.layer], stem, bias)
        reading.pieces.append(Piece(stem, place, made, keys))
    if not reading.pieces:
        raise UsageError(_nothing(state, reading, [s for s in found if not is_text(s)], what))
    return reading


def _is_unclear(stem: str, held: Mapping[str, tuple[str, Tensor]]) -> bool:
    return bool(_FUSED.fullmatch(stem)) and any(".default." in key for key, _ in held.values())


def in_parts(state: Mapping[str, Tensor], by_heads: bool) -> dict[str, Tensor]:
    """A DiffSynth-Studio LoRA of MiniMax-H3 with the rows of fused layers as ComfyUI has them, under clear names.

    by_heads: whether the file has them head by head. UsageError for a file that has no such layers, or odd ones.
    """
    made, unclear = dict(state), 0
    for stem, held in stems(state)[0].items():
        if not _is_unclear(stem, held):
            continue
        unclear += 1
        for what, (key, value) in held.items():
            del made[key]
            if by_heads and what in _ROWS:
                if value.shape[0] % (3 * _HEAD):
                    raise UsageError(f"{key} has {value.shape[0]} rows, which are no queries, keys and values of heads")
                value = value.unflatten(0, (-1, 3, _HEAD)).transpose(0, 1).flatten(0, 2)
            made[_NAMED + key] = value.contiguous()
    if not unclear:
        raise UsageError("--rows is for MiniMax-H3's LoRAs of DiffSynth-Studio: leave it out for this file")
    return made


def _refuse_halves(stem: str, tensors: Mapping[str, Tensor]) -> None:
    if (DOWN in tensors) != (UP in tensors):
        raise UsageError(f"the LoRA's layer {stem} has no second half; the file is damaged: download it again")


def _place(names: Names, stem: str, tensors: Mapping[str, Tensor]) -> tuple[Place | None, str]:
    if tensors.keys() <= {ALPHA, SHAPE} or (MAGNITUDE in tensors and UP not in tensors):
        return None, "they belong to no other tensor of the file"
    places = names.find(stem)
    for place in places:
        if _fits(place, names.shapes[place.layer], tensors):
            return place, ""
    if not places:
        return None, "the model has no such layer"
    shape = names.shapes[places[0].layer]
    rows = shape[0] if places[0].rows is None else places[0].rows[1]
    return None, f"they are of another size than the model's {places[0].layer}, {(rows, *shape[1:])}"


def _fits(place: Place, shape: Shape, tensors: Mapping[str, Tensor]) -> bool:
    rows = shape[0] if place.rows is None else place.rows[1]
    columns = math.prod(shape[1:])
    if SHAPE not in tensors and MID not in tensors and UP in tensors:
        up, down = tensors[UP], tensors[DOWN]
        if up.ndim < 2 or down.ndim < 2 or 0 in (*up.shape, *down.shape):
            return False
        if up.shape[0] != rows or up[0].numel() != down.shape[0]:
            return False
        if down[0].numel() != columns:
            return False
    if DIFF in tensors and tuple(tensors[DIFF].shape) != (rows, *shape[1:]):
        return False
    if MAGNITUDE in tensors and tensors[MAGNITUDE].numel() != rows:
        return False
    return BIAS not in tensors or tensors[BIAS].numel() == rows


def _normal(
    tensors: dict[str, Tensor], place: Place, shape: Shape, stem: str, scaled_bias: bool
) -> dict[str, Tensor]:
    """With magnitudes as columns, PEFT's biases as they act, and the order of rows of the network."""
    made = dict(tensors)
    if ALPHA in made and (made[ALPHA].numel() != 1 or not bool(made[ALPHA].isfinite())):
        raise UsageError(f"the LoRA's layer {stem} has an alpha that is no number; the file is damaged: get it again")
    for what in (DORA, MAGNITUDE):
        if what in made and (what == MAGNITUDE or made[what].ndim == 1):
            made[what] = made[what].reshape(-1, *(1 for _ in shape[1:]))
    if scaled_bias and ALPHA in made and DOWN in made:
        made[BIAS] = made[BIAS] * (float(made[ALPHA]) / len(made[DOWN]))
    if place.swapped:
        for what in _ROWS:
            if what in made and made[what].shape[0] > 1:
                made[what] = torch.cat(made[what].chunk(2)[::-1])
    return made


def _nothing(state: Mapping[str, Tensor], reading: Reading, layers: Sequence[str], what: str) -> str:
    if not layers and reading.text:
        return (
            f"the {len(state)} tensors of {what}, such as {example(reading.text)}, are a text encoder's alone: use it "
            "with the model that it was trained for"
        )
    if not layers:
        held = f"{len(state)} tensors such as {example(state)}" if state else "nothing"
        return (
            f"{what} is none: it holds {held}, and none called lora_A and lora_B, or lora_down and lora_up; choose "
            "another file"
        )
    why = next(iter(reading.left.values()))
    return (
        f"none of the {len(state)} tensors of {what}, such as {example(state)}, belongs to this model ({why})"
        f"{seems_for(layers)}: choose one that was made for this model"
    )


def fused_pairs(parts: Sequence[tuple[int, Tensor, Tensor]], rows: int) -> tuple[Tensor, Tensor]:
    """(down, up) of a layer of so many rows out of (first row, down, up) of parts of it, whose scales are in up.

    The rank is the sum of the parts', unless they share their down.
    """
    kind = _holding([down for _, down, _ in parts])
    downs = [down.to(kind) for _, down, _ in parts]
    shared = all(a.shape == downs[0].shape and torch.equal(a, downs[0]) for a in downs[1:])
    rank = len(downs[0]) if shared else sum(map(len, downs))
    ups = [up for _, _, up in parts]
    up = torch.zeros(rows, rank, dtype=_holding(ups), device=ups[0].device)
    column = 0
    for first, down, part in parts:
        part = part.flatten(1)
        up[first : first + len(part), column : column + len(down)] = part
        column += 0 if shared else len(down)
    return (downs[0] if shared else torch.cat([down.flatten(1) for down in downs])), up


def _holding(parts: Sequence[Tensor]) -> torch.dtype:
    """The dtype that holds the numbers of all parts as they are: the parts' own, where they have one."""
    kinds = {part.dtype for part in parts}
    if len(kinds) == 1:
        return parts[0].dtype
    return torch.float64 if torch.float64 in kinds else torch.float32


def whole(reading: Reading, rows: Mapping[str, int]) -> dict[str, dict[str, Tensor]]:
    """Layer -> tensors by what they are there, parts of a layer fused into one LoRA of higher rank, exactly.

    rows: of each layer. What cannot be fused goes from the pieces to what is left out.
    """
    by_layer: dict[str, list[Piece]] = {}
    for piece in reading.pieces:
        by_layer.setdefault(piece.place.layer, []).append(piece)
    made: dict[str, dict[str, Tensor]] = {}
    for layer, pieces in by_layer.items():
        if len(pieces) == 1 and pieces[0].place.rows in (None, (0, rows[layer])):
            made[layer] = pieces[0].tensors
            continue
        kept = [p for p in pieces if p.tensors.keys() <= _LINEAR - {DORA, MAGNITUDE} and p.place.rows is not None]
        for piece in pieces:
            if piece not in kept:
                reading.left |= dict.fromkeys(piece.keys, "only plain LoRAs of a part of a layer can be fused")
                reading.pieces.remove(piece)
        if kept:
            made[layer] = _fuse(kept, rows[layer])
    return made


def _fuse(pieces: list[Piece], rows: int) -> dict[str, Tensor]:
    first = [piece.place.rows[0] for piece in pieces if piece.place.rows is not None]
    made: dict[str, Tensor] = {}
    pairs = [(row, piece.tensors) for row, piece in zip(first, pieces, strict=True) if UP in piece.tensors]
    if pairs:
        scales = [float(t[ALPHA]) / len(t[DOWN]) if ALPHA in t else 1.0 for _, t in pairs]
        same = len(set(scales)) == 1
        # Scales that differ go into the rows, in fp32 so that nothing is rounded away.
        ups = [t[UP] if same else t[UP].float() * scale for (_, t), scale in zip(pairs, scales, strict=True)]
        down, up = fused_pairs([(row, t[DOWN], u) for (row, t), u in zip(pairs, ups, strict=True)], rows)
        made |= {DOWN: down, UP: up, ALPHA: torch.tensor((scales[0] if same else 1.0) * len(down))}
    for what in (DIFF, BIAS):
        parts = [(row, p.tensors[what]) for row, p in zip(first, pieces, strict=True) if what in p.tensors]
        if parts:
            values = [part for _, part in parts]
            made[what] = torch.zeros(
                rows, *values[0].shape[1:], dtype=_holding(values), device=values[0].device
            )
            for row, part in parts:
                made[what][row : row + len(part)] = part
    return made
