"""Whatever a LoRA file calls its layers, found in a network: diffusers', ComfyUI's and kohya's names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ...files.errors import UsageError
from .renames import Layout

_DOWN = (".lora_A.weight", ".lora_down.weight", ".lora.down.weight", ".lora_A.default.weight")
_UP = (".lora_B.weight", ".lora_up.weight", ".lora.up.weight", ".lora_B.default.weight")
_NETWORK = ("unet.", "transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.")
TEXT = ("lora_te", "text_encoder", "text_encoders.", "te1.", "te2.")
_OTHER_KINDS = ("hada_w1_a", "lokr_w1", "oft_blocks", "dora_scale", "lora_mid.weight", "diff", "diff_b")


def pairs(state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name as the file has it -> (down, up), alpha / rank multiplied into up. UsageError for other kinds."""
    for name in state:
        if name.endswith(tuple(f".{kind}" for kind in _OTHER_KINDS)):
            raise UsageError(
                f"the file holds {name.rpartition('.')[2]!r} tensors: a LoHa, LoKr, OFT, DoRA or full difference, "
                "which needs ComfyUI; plain LoRAs run here"
            )
    found = {}
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
        raise UsageError("this is no LoRA: it holds no lora_A/lora_B or lora_down/lora_up tensors")
    return found


def for_network(state: dict[str, Tensor], table: Layout, modules: Iterable[str]) -> dict[str, Tensor]:
    """A peft state dict (module.lora_A.weight, module.lora_B.weight) in diffusers' module names.

    Layers of text encoders are left out. UsageError for layers that the network lacks, naming one, and for none at all.
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
    if unknown:
        raise UsageError(
            f"the LoRA has {len(unknown)} layers that this model lacks, such as {unknown[0]}; use it with the model "
            "that it was trained for"
        )
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
