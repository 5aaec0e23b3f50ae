"""Gradient checkpointing on any network: its blocks forget what they computed and compute it again in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

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


class Checkpointed:
    """A block's forward that forgets what it computes; `forward` is what it was before."""

    def __init__(self, forward: Callable[..., Any]):
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # ComfyUI tells its blocks where they are through one dictionary, which says something else by the second pass.
        args = tuple(dict(value) if isinstance(value, dict) else value for value in args)
        kwargs = {key: dict(value) if isinstance(value, dict) else value for key, value in kwargs.items()}
        names, count, forward = tuple(kwargs), len(args), self.forward

        def named(*given: Any) -> Any:
            return forward(*given[:count], **dict(zip(names, given[count:], strict=True)))

        # By position: what a checkpoint is given by keyword, it keeps where hooks on saved tensors do not see it.
        # Dropout is drawn anew in the second pass unless the random state is kept; it is cheap beside a block.
        return checkpoint(named, *args, *kwargs.values(), use_reentrant=False)


class Preceded:
    """A block's forward that calls something first, also when a checkpoint runs it again."""

    def __init__(self, forward: Callable[..., Any], first: Callable[[], None]):
        self.forward, self.first = forward, first

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.first()
        return self.forward(*args, **kwargs)


def enable(network: nn.Module) -> int:
    """Checkpoint every unit of a network, in place; how many there are. Undone by `disable`."""
    found = units(network)
    for _, module in found:
        module.forward = Checkpointed(module.forward)
    return len(found)


def disable(network: nn.Module) -> None:
    """Take the checkpoints off again."""
    for _, module in units(network):
        _unwrap(module, Checkpointed)


def checkpointed(module: nn.Module) -> bool:
    """Whether a unit is."""
    return isinstance(module.forward, Checkpointed)


def enabled(network: nn.Module) -> bool:
    """Whether a network's units are."""
    return any(checkpointed(module) for module in network.modules())


def precede(module: nn.Module, first: Callable[[], None]) -> None:
    """Let a unit's forward begin with a call, inside its checkpoint. RuntimeError when it is checkpointed already."""
    if checkpointed(module):
        raise RuntimeError("what precedes a block belongs inside its checkpoint: do this before `enable`")
    module.forward = Preceded(module.forward, first)


def unprecede(module: nn.Module) -> None:
    """Undo `precede`, whether the unit is checkpointed or not."""
    around: Any = module.forward
    if isinstance(around, Checkpointed):
        if isinstance(around.forward, Preceded):
            around.forward = around.forward.forward
    else:
        _unwrap(module, Preceded)


def _unwrap(module: nn.Module, kind: type[Checkpointed] | type[Preceded]) -> None:
    if isinstance(module.forward, kind):
        inner = module.forward.forward
        del module.forward
        if getattr(inner, "__func__", None) is not type(module).forward:
            module.forward = inner
