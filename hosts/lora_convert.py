"""A LoRA file under the names that loaders have in common, from a file under any published ones.

Without the model its family is told by the names, and the sizes of fused layers by their parts. UNets get kohya's
names, SD3 and Flux diffusers', which all loaders read; other families ComfyUI's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor

from ..files import weights
from ..files.atomic import write_tensors
from ..files.errors import UsageError
from ..models.layouts.lora_keys import ALPHA, BIAS, DIFF, DOWN, MAGNITUDE, UP, bare, flat, is_text, shown, stems
from ..models.layouts.lora_places import Line, Names, Shape, placed_in
from ..models.layouts.lora_state import Reading, alphas_of, in_parts, read, whole, with_alphas
from ..models.layouts.lora_vocabulary import Family
from ..trainers.export import lora_metadata, read_lora

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net.")
# What diffusers would build adapters by, under the names of before.
_ADAPTER = "lora_adapter_metadata"
# ComfyUI calls these by their old names only, and diffusers reads those too.
_UNET_OWN = {"add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2"}

Held = dict[str, dict[str, Tensor]]


class Rows(StrEnum):
    """How a fused layer has queries, keys and values: head by head, or each apart."""

    HEADS = "heads"
    PARTS = "parts"


@dataclass(frozen=True)
class Converted:
    """path: of the file that was written. told: sentences on what its user must know."""

    path: Path
    told: list[str]


def convert(
    file: Path,
    out: Path | None,
    model: Path | None,
    alpha: float | None,
    rows: Rows | None = None,
) -> Converted:
    """Write a LoRA file's tensors under common names, with its metadata, to `out` (by default beside it).

    model: the file of the model that it is for, of which the header alone is read. alpha: where the file gives none.
    rows: how a LoRA of MiniMax-H3 under DiffSynth-Studio's names has queries, keys and values. UsageError for what is
    no LoRA, for magnitudes of PEFT's DoRA, which have no common name, for names of more than one family, and for an
    `out` that is there already.
    """
    if not file.exists():
        raise UsageError(f"there is no {file}")
    weights.shapes(file)  # says what is wrong with a file of another kind
    out = file.with_name(f"{file.stem}_converted.safetensors") if out is None else out
    if out.exists():
        raise UsageError(f"{out} is there already: choose another name with --out")
    if out.suffix != ".safetensors":
        raise UsageError(f"--out is {out.name}: a LoRA's name ends in .safetensors")
    state, metadata = read_lora(file), lora_metadata(file)
    if rows is not None:
        state = in_parts(state, rows is Rows.HEADS)
    known = alphas_of(metadata)

    def given(stem: str, rank: int) -> float | None:
        found = known(stem, rank)
        return alpha if found is None else found

    silent = not any(name.endswith(f".{ALPHA}") for name in with_alphas(state, known))
    tensors, reading = _converted(with_alphas(state, given), None if model is None else _layers(model))
    told = [reading.told()] if reading.left else []
    if silent and alpha is None and any(UP in piece.tensors for piece in reading.pieces):
        told.append(
            "the file says no alpha, which was taken as the rank: where its page names another, convert with --alpha"
        )
    kept = {name: value for name, value in metadata.items() if name != _ADAPTER}
    write_tensors(out, tensors, {**kept, "retort.converted_from": file.name})
    return Converted(out, told)


def _layers(model: Path) -> dict[str, Shape]:
    """Layers of a model's file, by ComfyUI's names, and their shapes."""
    shapes = weights.shapes(model)
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in shapes)), "")
    own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    layers = {name.removesuffix(".weight"): shape for name, shape in own.items() if not name.endswith(".bias")}
    found = placed_in(layers)
    if found and all(family.written == "own" and _renamed(places) for family, places in found):
        raise UsageError(f"--model {model.name} has diffusers' names: give the file that ComfyUI loads, or none")
    return layers


def _renamed(places: Mapping[str, tuple[str, Line]]) -> bool:
    return 2 * sum(own != name for name, (own, _) in places.items()) > len(places)


def _converted(
    state: Mapping[str, Tensor], layers: dict[str, Shape] | None
) -> tuple[dict[str, Tensor], Reading]:
    found = {
        stem: {what: value for what, (_, value) in held.items()}
        for stem, held in stems(state)[0].items() if not is_text(stem)
    }  # fmt: skip
    written = "own"
    if layers is None:
        family, places = _family(found)
        written = family.written
        if written == "own":
            layers = _shapes(found, places)
        else:
            # The names stay; what stands before them changes.
            names = {stem: next(n for n in bare(stem) if _begins(n, own)) for stem, (own, _) in places.items()}
            layers = {name: _shape(found[stem]) for stem, name in names.items()}
    elif any(name.startswith("input_blocks.") for name in layers):
        written = "kohya"
    reading = read(state, Names(layers))
    for piece in reading.pieces:
        if MAGNITUDE in piece.tensors:
            name = next(key for key in piece.keys if "magnitude" in key)
            raise UsageError(
                f"the LoRA has magnitudes of PEFT's DoRA ({name}), which other loaders would measure against the "
                "weight without the LoRA: use the file as it is, in Load Student or in PEFT"
            )
    made = whole(reading, {layer: shape[0] for layer, shape in layers.items()})
    out: dict[str, Tensor] = {}
    for layer, tensors in made.items():
        out |= _named(layer, tensors, written)
    return out | {name: state[name] for name in reading.text}, reading


def _begins(name: str, own: str) -> bool:
    return flat(name).removesuffix("_0") == flat(own).removesuffix("_0")


def _family(found: Held) -> tuple[Family, dict[str, tuple[str, Line]]]:
    families = placed_in(found)
    if not found:
        raise UsageError("the file holds no tensors of a LoRA: choose another one")
    names = f"the names of the LoRA's layers, such as {shown(found, 2)},"
    remedy = "give the file of the model that it is for with --model"
    if not families or 2 * len(families[0][1]) <= len(found):
        raise UsageError(f"{names} are of no family that is known: {remedy}")
    if len(families) > 1:
        raise UsageError(f"{names} may be of {' or '.join(family.title for family, _ in families)}: {remedy}")
    return families[0]


def _rows(held: Mapping[str, Tensor]) -> int:
    return next((held[what].shape[0] for what in (UP, DIFF, BIAS) if what in held and held[what].ndim), 0)


def _shape(held: Mapping[str, Tensor]) -> Shape:
    if DIFF in held:
        return tuple(held[DIFF].shape)
    return (_rows(held), *(held[DOWN].shape[1:] if DOWN in held else ()))


def _shapes(found: Held, places: Mapping[str, tuple[str, Line]]) -> dict[str, Shape]:
    """Shapes of the own layers by what the file has of them; of parts that it lacks, by what it has of others."""
    layers: dict[str, Shape] = {}
    parts: dict[str, list[tuple[str, Line]]] = {}
    for stem, (own, line) in places.items():
        if line.parts:
            parts.setdefault(own, []).append((stem, line))
        else:
            layers[own] = _shape(found[stem])
    for own, some in parts.items():
        columns = _shape(found[some[0][0]])[1:]
        sizes = {line.part: _rows(found[stem]) for stem, line in some}
        squares = [square for _, square in some[0][1].parts]
        others = [size for part, size in sizes.items() if not squares[part]]
        lacking = [i for i, square in enumerate(squares) if i not in sizes and not square]
        if lacking and not others:
            raise UsageError(
                f"the LoRA has of the layer {own} no part that tells how large the others are: give the file of the "
                "model that it is for with --model"
            )
        other = max(others, default=0)
        layers[own] = (
            sum(sizes.get(i, math.prod(columns) if square else other) for i, square in enumerate(squares)), *columns,
        )  # fmt: skip
    return layers


def _named(layer: str, tensors: Mapping[str, Tensor], written: str) -> dict[str, Tensor]:
    made = dict(tensors)
    if UP in made and ALPHA not in made:
        made[ALPHA] = torch.tensor(float(len(made[DOWN])))
    if written == "kohya":
        name = flat(layer)
        return {f"lora_unet_{_UNET_OWN.get(name, name)}.{what}": tensor for what, tensor in made.items()}
    if written == "transformer":
        spelt = {DOWN: "lora_A.weight", UP: "lora_B.weight"}
        return {f"transformer.{layer}.{spelt.get(what, what)}": tensor for what, tensor in made.items()}
    return {f"diffusion_model.{layer}.{what}": tensor for what, tensor in made.items()}
