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
from ...models.layouts.lora_names import TEXT, Note, for_network, pairs, tell_unused
from ...models.layouts.renames import Layout

Kind = Literal["unet", "transformer", "plain"]
_A, _B = ".lora_A.weight", ".lora_B.weight"
# ComfyUI calls this one by its old name only, and diffusers reads that too.
_UNET_OWN = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")


def _layers(network: nn.Module) -> dict[str, int]:
    """Rows of every layer's output, by its name without adapters."""
    rows = {}
    for name, parameter in network.named_parameters():
        if name.endswith(".weight") and ".lora_" not in name:
            rows[name.removesuffix(".weight").removesuffix(".base_layer")] = parameter.shape[0]
    return rows


def published_kind(network: nn.Module) -> tuple[Kind, Layout]:
    """What family a network in a published layout (ComfyUI's names) is of, and its table; "plain" has an empty one."""
    tensors = (*network.named_parameters(), *network.named_buffers())
    shapes = {name.replace(".base_layer.", "."): tuple(t.shape) for name, t in tensors if ".lora_" not in name}
    if layout_dit.is_sd3(shapes):
        return "transformer", layout_dit.sd3_layout(layout_dit.sd3_config(shapes))
    if layout_dit.is_flux(shapes):
        return "transformer", layout_dit.flux_layout(layout_dit.flux_config(shapes))
    if layout_unet.is_unet(shapes):
        try:
            return "unet", layout_unet.layout(layout_unet.config(shapes))
        except UsageError:
            # A UNet that diffusers' table does not describe (inpainting, SD2, a family of its own): its own names do.
            return "plain", Layout()
    return "plain", Layout()


@dataclass(frozen=True)
class LoraNames:
    """How the layers of one network are called in files.

    kind and table: its family's. layers: name -> rows of its output. published: its names are the published layout's
    (ComfyUI), not diffusers'.
    """

    kind: Kind
    table: Layout
    layers: dict[str, int]
    published: bool

    @classmethod
    def of_published(cls, network: nn.Module) -> LoraNames:
        """For a network with ComfyUI's names."""
        kind, table = published_kind(network)
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
        homes = {target: name for name, targets in self.table.modules.items() for target in targets}
        flat = {name.replace(".", "_"): name for name in (*homes, *self.layers)}
        whole: dict[str, tuple[Tensor, Tensor]] = {}
        apart: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        unknown = []
        for layer, pair in pairs(state).items():
            if layer.startswith(TEXT):
                continue
            name = layer
            for prefix in _PREFIXES:
                name = name.removeprefix(prefix)
            name = flat.get(name.removeprefix("lora_unet_").removeprefix("lora_transformer_").replace(".", "_"), name)
            if name in self.layers:
                whole[name] = pair
            elif name in homes and homes[name] in self.layers:
                apart.setdefault(homes[name], {})[name] = pair
            else:
                unknown.append(layer)
        tell_unused(state, len(whole) + sum(map(len, apart.values())), unknown, note)
        whole |= {name: self._fused(name, parts) for name, parts in apart.items()}
        return {
            name + end: tensor.contiguous()
            for name, pair in whole.items()
            for end, tensor in zip((_A, _B), pair, strict=True)
        }

    def _fused(self, name: str, parts: dict[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        targets = self.table.modules[name]
        rows = self.table.rows.get(name, (self.layers[name] // len(targets),) * len(targets))
        downs = [parts[target][0] for target in targets if target in parts]
        shared = all(torch.equal(downs[0], down) for down in downs[1:])
        up = downs[0].new_zeros(sum(rows), downs[0].shape[0] if shared else sum(len(down) for down in downs))
        row = column = 0
        for target, height in zip(targets, rows, strict=True):
            if target in parts:
                part = parts[target][1].flatten(1)
                up[row : row + height, column : column + part.shape[1]] = part
                column += 0 if shared else part.shape[1]
            row += height
        if name in self.table.swapped:
            up = torch.cat(up.chunk(2)[::-1])
        if len(targets) == 1:
            # One part: a convolution keeps the shape of its kernel.
            up = up.reshape(up.shape[0], up.shape[1], *parts[targets[0]][1].shape[2:])
        return downs[0] if shared else torch.cat(downs), up
