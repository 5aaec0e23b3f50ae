"""Gradient checkpointing on any network: its blocks forget what they computed and compute it again in backward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .entries import Around, surround, surrounded, uncover

INNER_SHARE = 0.75  # of a block's weights that its inner blocks hold, where they are taken instead of it
CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def blocks(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the network's repeated blocks in order: the first things with a forward inside its lists.

    A UNet's sequences of layers count as lists, since its code walks through them itself.
    """

    def below(name: str, module: nn.Module, listed: bool) -> Iterator[tuple[str, nn.Module]]:
        for child_name, child in module.named_children():
            full = f"{name}.{child_name}" if name else child_name
            if isinstance(child, CONTAINERS):
                yield from below(full, child, True)
            elif listed and _layers(child) >= 2:
                yield full, child
            elif not listed:
                yield from below(full, child, False)

    return list(below("", network, False))


def _layers(module: nn.Module) -> int:
    # By their weights: quantised layers are none of torch's classes. A layer with adapters holds three, and is one.
    weights = [p for name, p in module.named_parameters() if name.endswith("weight") and "lora_" not in name]
    return sum(weight.ndim >= 2 for weight in weights)


def units(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of what is checkpointed and streamed: the network's blocks, or smaller ones that they consist of.

    SDXL's and SD1.5's blocks of attention are up to ten transformer blocks in a list of their own.
    """

    def within(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        inner = blocks(module)
        if inner and sum(_numbers(part) for _, part in inner) >= INNER_SHARE * _numbers(module):
            for inner_name, part in inner:
                yield from within(f"{name}.{inner_name}", part)
        else:
            yield name, module

    return [found for name, module in blocks(network) for found in within(name, module)]


def _numbers(module: nn.Module) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if "lora_" not in name)


class Checkpointed(Around):
    """An entry of a block that forgets what it computes."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """See the base."""
        # ComfyUI tells its blocks where they are through one dictionary, which says something else by the second pass.
        # Others fill a cache that the second pass would find full.
        # Tensors are left to the checkpoint, so that they can wait in host memory.
        kept = [None if isinstance(value, Tensor) else _remembered(value) for value in (*args, *kwargs.values())]
        names, count, passes = tuple(kwargs), len(args), 0

        def run(*given: Any) -> Any:
            nonlocal passes
            passes += 1
            told = [
                _told(now, before, passes == 1)
                for now, before in zip(given, kept, strict=True)
            ]
            return self.within(*told[:count], **dict(zip(names, told[count:], strict=True)))

        # By position: what a checkpoint is given by keyword, it keeps where hooks on saved tensors do not see it.
        # Dropout is drawn anew in the second pass unless the random state is kept; it is cheap beside a block.
        return checkpoint(run, *args, *kwargs.values(), use_reentrant=False)


def _remembered(value: Any) -> Any:
    """Dictionaries, and objects that hold some, as they are now; tensors and all else themselves."""
    if type(value) is tuple:
        return tuple(_remembered(part) for part in value)
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, Tensor | nn.Module) or not _filled(value):
        return value
    kept = copy.copy(value)
    vars(kept).update({name: dict(part) for name, part in vars(value).items() if isinstance(part, dict)})
    return kept


def _filled(value: Any) -> bool:
    return hasattr(value, "__dict__") and any(isinstance(part, dict) for part in vars(value).values())


def _told(now: Any, before: Any, first: bool) -> Any:
    """What a pass of a block is given. A cache is filled by the first one for the blocks that follow."""
    if isinstance(now, Tensor) or before is now:
        return now
    return now if first and not isinstance(now, dict) else _remembered(before)


class Preceded(Around):
    """An entry of a block that calls something first, also when a checkpoint runs it again."""

    def __init__(self, forward: Callable[..., Any], inside: list[bool], first: Callable[[], None]):
        super().__init__(forward, inside)
        self.first = first

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """See the base."""
        self.first()
        return self.within(*args, **kwargs)


def enable(network: nn.Module) -> int:
    """Checkpoint every unit of a network, in place; how many there are. Undone by `disable`."""
    found = units(network)
    for _, module in found:
        surround(module, Checkpointed)
    return len(found)


def disable(network: nn.Module) -> None:
    """Take the checkpoints off again."""
    for _, module in units(network):
        uncover(module, Checkpointed)


def checkpointed(module: nn.Module) -> bool:
    """Whether a unit is."""
    return surrounded(module, Checkpointed)


def enabled(network: nn.Module) -> bool:
    """Whether a network's units are."""
    return any(checkpointed(module) for module in network.modules())


def precede(module: nn.Module, first: Callable[[], None]) -> None:
    """Let a unit's entries begin with a call, inside its checkpoint. RuntimeError when it is checkpointed already."""
    if checkpointed(module):
        raise RuntimeError("what precedes a block belongs inside its checkpoint: do this before `enable`")
    surround(module, lambda forward, inside: Preceded(forward, inside, first))


def unprecede(module: nn.Module) -> None:
    """Undo `precede`, whether the unit is checkpointed or not."""
    uncover(module, Preceded)
