"""Whatever a LoRA file calls its layers, found in diffusers' modules: diffusers' names, ComfyUI's and kohya's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ...files.errors import UsageError
from .lora_keys import ALPHA, DOWN, UP, bare, example, flat, is_text, stems
from .lora_places import seems_for
from .renames import Layout

Note = Callable[[str], None]
_log = logging.getLogger("retort.lora")


def tell_unused(state: dict[str, Tensor], used: int, unknown: list[str], note: Note | None = None) -> None:
    """What becomes of a file's layers (as it calls them) that a model lacks, `used` others being applied.

    UsageError where none is used; else `note`, or the log, is told of them and of tensors that belong to no layer.
    """
    if not used:
        found = f"the LoRA's {len(state)} tensors, such as {example(state)}, are a text encoder's alone"
        if unknown:
            found = (
                f"the LoRA has {len(unknown)} layers that this model lacks, such as {unknown[0]}, and no other"
                f"{seems_for(unknown)}"
            )
        raise UsageError(f"{found}; use it with the model that it was trained for")
    _, others = stems(state)
    told = []
    if unknown:
        told.append(f"{len(unknown)} of the LoRA's layers, such as {unknown[0]}, are not in this model")
    if others:
        told.append(f"{len(others)} of its tensors, such as {example(others)}, are no part of a LoRA")
    if told:
        (note or _log.warning)(f"{' and '.join(told)}: they are left out, and {used} layers are used")


def pairs(state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name as the file has it -> (down, up), alpha / rank multiplied into up. UsageError for other kinds."""
    layers, _ = stems(state)
    found = {}
    for layer, held in layers.items():
        tensors = {what: value for what, (_, value) in held.items()}
        for what, (key, _) in held.items():
            if what not in (DOWN, UP, ALPHA):
                raise UsageError(
                    f"the file holds {key.rpartition('.')[2]!r} tensors: a LoHa, LoKr, OFT, DoRA or full difference, "
                    "which needs ComfyUI; plain LoRAs run here"
                )
        if DOWN not in tensors and UP not in tensors:
            continue
        if DOWN not in tensors or UP not in tensors:
            raise UsageError(f"the LoRA's layer {layer} has no second half; the file is damaged: download it again")
        down, up, alpha = tensors[DOWN], tensors[UP], tensors.get(ALPHA)
        if min(down.ndim, up.ndim) < 2 or down.shape[0] != up.shape[1] or 0 in (*down.shape, *up.shape):
            shapes = " and ".join(str(tuple(half.shape)) for half in (down, up))
            raise UsageError(
                f"the LoRA's layer {layer} has halves of {shapes}, which are no pair; the file is damaged: download it "
                "again"
            )
        if alpha is not None and alpha.numel() != 1:
            raise UsageError(f"the LoRA's layer {layer} has an alpha of {alpha.numel()} numbers; get the file again")
        scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
        found[layer] = (down.float(), up.float() * scale)
    if not found:
        inside = f"{len(state)} tensors such as {example(state)}" if state else "nothing"
        raise UsageError(
            f"this is no LoRA: it holds {inside}, and none called lora_A and lora_B, or lora_down and lora_up; choose "
            "another file"
        )
    return found


def for_network(
    state: dict[str, Tensor], table: Layout, modules: Iterable[str], note: Note | None = None
) -> dict[str, Tensor]:
    """A peft state dict (module.lora_A.weight, module.lora_B.weight) in diffusers' module names.

    Layers of text encoders are left out. UsageError where no layer is the network's, naming one; of some that are not,
    `note`, or the log, is told.
    """
    known = set(modules) - {""}  # the network itself
    named = {spelt: name for name in (*table.modules, *known) for spelt in (flat(name), name)}
    out: dict[str, Tensor] = {}
    unknown = []
    for layer, (down, up) in pairs(state).items():
        if is_text(layer):
            continue
        name = next((named[n] for n in bare(layer) if n in named), None) or named.get(flat([*bare(layer)][-1]), "")
        if name in known:
            targets = [(name, up)]
        elif name in table.modules and all(t in known for t in table.modules[name]):
            targets = table.split(name, up)
        else:
            unknown.append(layer)
            continue
        for target, part in targets:
            out[f"{target}.lora_A.weight"] = down
            out[f"{target}.lora_B.weight"] = part.contiguous()
    tell_unused(state, len(out) // 2, unknown, note)
    return out


def merged(weights: Mapping[str, Tensor], lora: Mapping[str, Tensor], strength: float) -> Iterator[tuple[str, Tensor]]:
    """(name, W + strength B A) of each weight `layer.weight` that a peft state dict changes, rounded once to its type.

    weights: by name, of any shape whose first dimension is the output. KeyError for a layer that is not among them,
    UsageError for one of another size.
    """
    for key, down in lora.items():
        layer, end, _ = key.partition(".lora_A.weight")
        if end:
            weight = weights[f"{layer}.weight"].detach()
            up, down = (x.to(weight.device, torch.float32).flatten(1) for x in (lora[f"{layer}.lora_B.weight"], down))
            if (len(up), down.shape[1]) != (len(weight), weight[0].numel()):
                raise UsageError(
                    f"the LoRA's layer {layer} is for one of {len(up)} x {down.shape[1]}, and the model's has "
                    f"{len(weight)} x {weight[0].numel()}; use it with the model that it was trained for"
                )
            yield f"{layer}.weight", (weight.float() + (strength * (up @ down)).view_as(weight)).to(weight.dtype)
