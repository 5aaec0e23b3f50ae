"""Whatever a LoRA file calls its layers, found in a network: diffusers', ComfyUI's and kohya's names."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ...files.errors import UsageError
from .renames import Layout

_DOWN = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight", ".lora_A.default.weight")
_UP = (".lora_B.weight", ".lora_up.weight", ".lora.up.weight", ".lora_B.default.weight")
# diffusers' first scripts kept LoRAs in attention processors: `attn1.processor.to_out_lora.up.weight`.
_PROCESSOR = re.compile(r"(.*)\.processor\.(.*)_lora\.(down|up)\.weight")
_NETWORK = ("unet.", "transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.")
TEXT = ("lora_te", "text_encoder", "text_encoders.", "te1.", "te2.")
_OTHER_KINDS = ("hada_w1_a", "lokr_w1", "oft_blocks", "dora_scale", "lora_mid.weight", "diff", "diff_b")


Note = Callable[[str], None]
_log = logging.getLogger("retort.lora")


def _modern(name: str) -> str:
    """A tensor's name, one of an attention processor as one of the layer itself."""
    old = _PROCESSOR.fullmatch(name)
    if old is None:
        return name
    layer = {"to_out": "to_out.0"}.get(old[2], old[2])
    return f"{old[1]}.{layer}.lora_{old[3]}.weight"


def _shown(names: Iterable[str]) -> str:
    return f"{next(iter(sorted(names)), '')!r:.100}"


def tell_unused(state: dict[str, Tensor], used: int, unknown: list[str], note: Note | None = None) -> None:
    """What becomes of a file's layers (as it calls them) that a model lacks, `used` others being applied.

    UsageError where none is used; else `note`, or the log, is told of them and of tensors that belong to no layer.
    """
    if not used:
        found = f"the LoRA's {len(state)} tensors, such as {_shown(state)}, are a text encoder's alone"
        if unknown:
            found = f"the LoRA has {len(unknown)} layers that this model lacks, such as {unknown[0]}, and no other"
        raise UsageError(f"{found}; use it with the model that it was trained for")
    others = [name for name in state if not _modern(name).endswith((*_DOWN, *_UP, ".alpha"))]
    told = []
    if unknown:
        told.append(f"{len(unknown)} of the LoRA's layers, such as {unknown[0]}, are not in this model")
    if others:
        told.append(f"{len(others)} of its tensors, such as {_shown(others)}, are no part of a LoRA")
    if told:
        (note or _log.warning)(f"{' and '.join(told)}: they are left out, and {used} layers are used")


def pairs(state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name as the file has it -> (down, up), alpha / rank multiplied into up. UsageError for other kinds."""
    for name in state:
        if name.endswith(tuple(f".{kind}" for kind in _OTHER_KINDS)):
            raise UsageError(
                f"the file holds {name.rpartition('.')[2]!r} tensors: a LoHa, LoKr, OFT, DoRA or full difference, "
                "which needs ComfyUI; plain LoRAs run here"
            )
    given, found = state, {}
    state = {_modern(name): tensor for name, tensor in given.items()}
    for name, down in state.items():
        end = next((e for e in _DOWN if name.endswith(e)), None)
        if end is None:
            continue
        layer = name.removesuffix(end)
        up = next((state[layer + e] for e in _UP if layer + e in state), None)
        if up is None:
            raise UsageError(f"the LoRA's layer {layer} has no second half; the file is damaged: download it again")
        alpha = state.get(f"{layer}.alpha")
        scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
        found[layer] = (down.float(), up.float() * scale)
    if not found:
        held = f"{len(given)} tensors such as {_shown(given)}" if given else "nothing"
        raise UsageError(
            f"this is no LoRA: it holds {held}, and none called lora_A and lora_B, or lora_down and lora_up; choose "
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
    known = set(modules)
    flat = {name.replace(".", "_"): name for name in (*table.modules, *known)}
    out: dict[str, Tensor] = {}
    unknown = []
    for layer, (down, up) in pairs(state).items():
        if layer.startswith(TEXT):
            continue
        name = layer
        for prefix in _NETWORK:
            name = name.removeprefix(prefix)
        name = flat.get(name.removeprefix("lora_unet_").removeprefix("lora_transformer_").replace(".", "_"), name)
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

    weights: by name, of any shape whose first dimension is the output. KeyError for a layer that is not among them.
    """
    for key, down in lora.items():
        layer, end, _ = key.partition(".lora_A.weight")
        if end:
            weight = weights[f"{layer}.weight"].detach()
            up, down = (x.to(weight.device, torch.float32).flatten(1) for x in (lora[f"{layer}.lora_B.weight"], down))
            yield f"{layer}.weight", (weight.float() + (strength * (up @ down)).view_as(weight)).to(weight.dtype)
