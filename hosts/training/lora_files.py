"""LoRA files that ComfyUI's loader and diffusers both read, and the way back from any file to a network's own names.

UNets (SD1.5, SDXL): kohya's names on diffusers' paths, `lora_unet_down_blocks_0_..._to_q.lora_down.weight`. diffusers'
own `unet.*.to_q.lora_A.weight` would not do: ComfyUI knows UNet attention only as `processor.to_q`. SD3 and Flux:
`transformer.<diffusers path>.lora_A.weight`, with fused projections taken apart. Others: `diffusion_model.<name>`.
No alpha is written: it equals the rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...files.errors import UsageError
from ...models.layouts import dit as layout_dit
from ...models.layouts import unet as layout_unet
from ...models.layouts.lora_keys import is_text
from ...models.layouts.lora_names import Note, for_network, pairs, tell_unused
from ...models.layouts.lora_places import Names, Place, of_table
from ...models.layouts.lora_state import fused_pairs
from ...models.layouts.renames import Layout

Kind = Literal["unet", "transformer", "plain"]
Family = Literal["sd3", "flux", "unet"]  # whose names diffusers has a table for
_A, _B = ".lora_A.weight", ".lora_B.weight"
# ComfyUI calls this one by its old name only, and diffusers reads that too.
_UNET_OWN = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}


def _layers(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every layer's weight, by its name without adapters."""
    shapes = {}
    for name, parameter in network.named_parameters():
        if name.endswith(".weight") and ".lora_" not in name:
            shapes[name.removesuffix(".weight").removesuffix(".base_layer")] = tuple(parameter.shape)
    return shapes


def published_kind(network: nn.Module, family: Family | None) -> tuple[Kind, Layout]:
    """How layers of a network in a published layout (ComfyUI's names) are called, and its table; "plain" has none.

    family: which one it is of, as the host knows from the network's class; None for every other.
    """
    tensors = (*network.named_parameters(), *network.named_buffers())
    shapes = {name.replace(".base_layer.", "."): tuple(t.shape) for name, t in tensors if ".lora_" not in name}
    if family == "sd3":
        return "transformer", layout_dit.sd3_layout(layout_dit.sd3_config(shapes))
    if family == "flux":
        return "transformer", layout_dit.flux_layout(layout_dit.flux_config(shapes))
    if family == "unet":
        try:
            return "unet", layout_unet.layout(layout_unet.config(shapes))
        except UsageError:
            # A UNet that diffusers' table does not describe (inpainting, SD2, a family of its own): its own names do.
            return "plain", Layout()
    return "plain", Layout()


@dataclass(frozen=True)
class LoraNames:
    """How the layers of one network are called in files.

    kind and table: its family's. layers: name -> shape of its weight. published: its names are the published layout's
    (ComfyUI), not diffusers'.
    """

    kind: Kind
    table: Layout
    layers: dict[str, tuple[int, ...]]
    published: bool

    @classmethod
    def of_published(cls, network: nn.Module, family: Family | None) -> LoraNames:
        """For a network with ComfyUI's names; family: see `published_kind`."""
        kind, table = published_kind(network, family)
        return cls(kind, table, _layers(network), True)

    @classmethod
    def of_diffusers(cls, network: nn.Module, kind: Kind, table: Layout) -> LoraNames:
        """For diffusers' module of a family."""
        return cls(kind, table, _layers(network), False)

    def to_file(self, lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A network's LoRA (layer.lora_A.weight, layer.lora_B.weight, alpha = rank) under a file's names."""
        out: dict[str, Tensor] = {}
        for key, down in lora.items():
            if not key.endswith(_A):
                continue
            layer = key.removesuffix(_A)
            up = lora[layer + _B]
            known = layer in self.table.modules
            parts = self.table.split(layer, up) if self.published and known else [(layer, up)]
            named = known or not self.published
            for i, (name, part) in enumerate(parts):
                stem, ends = self._written(name, named)
                # Two names of one tensor cannot be saved.
                out[stem + ends[0]] = down.contiguous() if i == 0 else down.clone()
                out[stem + ends[1]] = part.contiguous()
        return out

    def _written(self, name: str, named: bool) -> tuple[str, tuple[str, str]]:
        if not named or self.kind == "plain":
            return f"diffusion_model.{name}", (_A, _B)
        if self.kind == "unet":
            flat = _UNET_OWN.get(name, name).replace(".", "_")
            return f"lora_unet_{flat}", (".lora_down.weight", ".lora_up.weight")
        return f"transformer.{name}", (_A, _B)

    def from_file(self, state: dict[str, Tensor], note: Note | None = None) -> dict[str, Tensor]:
        """A LoRA file's tensors as the network names them, alpha folded in; text encoders are left out.

        Fused layers of a file that has them apart get the sum of the parts' ranks, unless the parts share their A.
        ValueError where the network has none of its layers, and for LoHa, LoKr and the like; `note`, or the log, is
        told of layers that it lacks.
        """
        if not self.published:
            return for_network(state, self.table, self.layers, note)
        names = Names(self.layers, of_table(self.table, self.layers))
        parts: dict[str, list[tuple[Place, tuple[Tensor, Tensor]]]] = {}
        unknown = []
        for layer, pair in pairs(state).items():
            if is_text(layer):
                continue
            places = names.find(layer)
            if places:
                parts.setdefault(places[0].layer, []).append((places[0], pair))
            else:
                unknown.append(layer)
        tell_unused(state, sum(map(len, parts.values())), unknown, note)
        whole = {name: self._fused(name, some) for name, some in parts.items()}
        return {
            name + end: tensor.contiguous()
            for name, pair in whole.items()
            for end, tensor in zip((_A, _B), pair, strict=True)
        }

    def _fused(self, name: str, parts: list[tuple[Place, tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor]:
        if len(parts) == 1 and parts[0][0].rows is None:
            # A convolution keeps the shape of its kernel.
            down, up = parts[0][1]
        else:
            apart = [(0 if place.rows is None else place.rows[0], *pair) for place, pair in parts]
            down, up = fused_pairs(apart, self.layers[name][0])
        return down, torch.cat(up.chunk(2)[::-1]) if parts[0][0].swapped else up
