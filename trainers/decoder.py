"""A decoder that gradients pass and that keeps little for it: its blocks compute again in backward what they forgot.

Without that a decoder keeps more at 1024 pixels than the network that it decodes for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .checkpointing import CONTAINERS

Named = list[tuple[str, nn.Module]]


class Decoder:
    """Images of stored latents, with gradients. decode: the host's own function, which runs `network`."""

    def __init__(self, network: nn.Module, decode: Callable[[Tensor], Tensor]):
        self.network, self._decode = network, decode
        self.blocks = blocks(network)

    def __call__(self, latents: Tensor) -> Tensor:
        """IMAGE (B, h, w, 3) of latents as a LATENT stores them."""
        if not torch.is_grad_enabled():
            return self._decode(latents)
        with _forgetting(self.blocks):
            return self._decode(latents)


def blocks(network: nn.Module) -> Named:
    """(name, module) of a decoder's smallest parts that are worth a checkpoint, in order.

    The innermost modules of two layers and more, and beside them those that enlarge before their one layer. A module
    that only holds others, or that keeps notes from one call to the next, is none.
    """
    pairs = list(_innermost("", network, 2))
    inside = {id(part) for _, module in pairs for part in module.modules()}
    single = [(name, module) for name, module in _innermost("", network, 1) if id(module) not in inside]
    order = {id(module): number for number, module in enumerate(network.modules())}
    return sorted((pair for pair in (*pairs, *single) if _forgets(pair[1])), key=lambda pair: order[id(pair[1])])


def _innermost(name: str, module: nn.Module, least: int) -> Iterator[tuple[str, nn.Module]]:
    children = list(module.named_children())
    within = [pair for key, child in children for pair in _innermost(f"{name}.{key}" if name else key, child, least)]
    yield from within
    runs = not isinstance(module, CONTAINERS) and type(module).forward is not nn.Module.forward
    if not within and children and runs and _layers(module) >= least:
        yield name, module


def _layers(module: nn.Module) -> int:
    return sum(any(p.ndim >= 2 for p in part.parameters(recurse=False)) for part in module.modules())


def _forgets(module: nn.Module) -> bool:
    """Whether a module's second call sees what its first one saw: it writes into no dictionary of its own."""
    kept = (value for part in module.modules() for name, value in vars(part).items() if not name.startswith("_"))
    return not any(isinstance(value, dict) for value in kept)


@contextmanager
def _forgetting(found: Named) -> Iterator[None]:
    """Checkpoint these modules for calls within; their backward passes may come after it."""
    before = [(module, vars(module).get("forward")) for _, module in found]
    try:
        for module, _ in before:
            module.forward = _checkpointed(module.forward)
        yield
    finally:
        for module, forward in before:
            del module.forward
            if forward is not None:
                module.forward = forward


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        names, count, values = tuple(kwargs), len(args), (*args, *kwargs.values())
        # Decoders of videos hand edges of one piece on to the next in lists, which each block changes.
        lists = {i: list(value) for i, value in enumerate(values) if isinstance(value, list)}
        again = False

        def named(*given: Any) -> Any:
            nonlocal again
            if again:
                given = tuple(list(lists[i]) if i in lists else value for i, value in enumerate(given))
            again = True
            return forward(*given[:count], **dict(zip(names, given[count:], strict=True)))

        return checkpoint(named, *values, use_reentrant=False)

    return run
