"""Tensor names of a published file against those of the diffusers class that runs it.

One table per network serves weights and LoRAs alike: original module -> the diffusers modules that its rows become.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Layout:
    """modules: original module (or bare parameter) -> diffusers modules, its rows shared out among them.

    rows: rows of each where they are not equal. swapped: modules whose halves (shift, scale) diffusers has the other
    way round. flat: modules whose 1 x 1 convolutions are linear layers in diffusers.
    """

    modules: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    swapped: set[str] = field(default_factory=set)
    flat: set[str] = field(default_factory=set)

    def add(self, original: str, *diffusers: str) -> None:
        """One line of the table."""
        self.modules[original] = diffusers

    def add_all(self, prefix: str, target: str, pairs: Iterable[tuple[str, str]]) -> None:
        """Several lines under common prefixes."""
        for original, diffusers in pairs:
            self.add(prefix + original, target + diffusers)

    def split(self, module: str, value: Tensor) -> list[tuple[str, Tensor]]:
        """(diffusers module, its part) of a tensor whose first axis is the module's output."""
        targets = self.modules[module]
        if module in self.swapped:
            value = torch.cat(value.chunk(2)[::-1])
        if module in self.flat:
            value = value.flatten(1) if value.ndim > 1 else value
        parts = value.split(self.rows[module]) if module in self.rows else value.chunk(len(targets))
        return list(zip(targets, parts, strict=True))

    def convert(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """(diffusers state dict, original names that the table lacks)."""
        out: dict[str, Tensor] = {}
        unknown = []
        for name, value in state.items():
            module, _, end = name.rpartition(".")
            if name in self.modules:  # a parameter without a module of its own
                out[self.modules[name][0]] = value
            elif module in self.modules:
                end = "weight" if end == "scale" else end
                out |= {f"{target}.{end}": part for target, part in self.split(module, value)}
            else:
                unknown.append(name)
        return out, unknown

    def restore(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `convert`, for tables without flat modules: a diffusers state dict under original names."""
        out: dict[str, Tensor] = {}
        for original, targets in self.modules.items():
            if targets[0] in state:  # a parameter without a module of its own
                out[original] = state[targets[0]]
                continue
            for end in ("weight", "bias"):
                if f"{targets[0]}.{end}" not in state:
                    continue
                whole = torch.cat([state[f"{target}.{end}"] for target in targets])
                if original in self.swapped:
                    whole = torch.cat(whole.chunk(2)[::-1])
                out[f"{original}.{end}"] = whole
        return out


def count(names: Iterable[str], prefix: str) -> int:
    """How many numbered modules follow a prefix such as "blocks."."""
    numbers = {name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix)}
    return len({n for n in numbers if n.isdigit()})
