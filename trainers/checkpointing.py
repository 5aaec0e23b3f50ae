"""Gradient checkpointing on any network: its blocks forget what they computed and compute it again in backward."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.utils.checkpoint import checkpoint

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


def enable(network: nn.Module) -> int:
    """Checkpoint every block of a network, in place; how many there are. Undone by `disable`."""
    found = blocks(network)
    for _, module in found:
        module.forward = _checkpointed(module.forward)
    return len(found)


def enabled(network: nn.Module) -> bool:
    """Whether the network's blocks are checkpointed."""
    return any("forward" in vars(module) for _, module in blocks(network))


def disable(network: nn.Module) -> None:
    """Take the checkpoints off again."""
    for _, module in blocks(network):
        module.__dict__.pop("forward", None)


def _checkpointed(forward):
    def run(*args, **kwargs):
        # ComfyUI tells its blocks where they are through one dictionary, which says something else by the second pass.
        args = tuple(dict(value) if isinstance(value, dict) else value for value in args)
        kwargs = {key: dict(value) if isinstance(value, dict) else value for key, value in kwargs.items()}
        names, count = tuple(kwargs), len(args)

        def named(*given):
            return forward(*given[:count], **dict(zip(names, given[count:], strict=True)))

        # By position: what a checkpoint is given by keyword, it keeps where hooks on saved tensors do not see it.
        # Dropout is drawn anew in the second pass unless the random state is kept; it is cheap beside a block.
        return checkpoint(named, *args, *kwargs.values(), use_reentrant=False)

    return run
