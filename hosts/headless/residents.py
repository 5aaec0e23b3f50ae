"""Networks that stay on the card from one call to the next, and leave it when a training wants the room."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import nn

from .device import device

_known: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_frugal = 0


def brought(module: nn.Module, where: torch.device) -> None:
    """Have a network where it computes; on a card until `make_room`."""
    first = next(module.parameters(), None)
    if where.type == "cpu" or first is None:
        return
    if first.device.type != where.type:
        with torch.inference_mode(False):  # a trainer may take gradients through the same weights
            module.to(where)
    _known.add(module)


@contextlib.contextmanager
def lent(module: nn.Module) -> Iterator[torch.device]:
    """The device, with a network on it: within `frugal` for this call alone, unless gradients will pass it later."""
    where = device()
    brought(module, where)
    try:
        yield where
    finally:
        if _frugal and not torch.is_grad_enabled():
            _send_away(module)


@contextlib.contextmanager
def frugal() -> Iterator[None]:
    """Within it nothing stays that was only needed for a call."""
    global _frugal
    _frugal += 1
    try:
        yield
    finally:
        _frugal -= 1


def make_room() -> None:
    """Bring all of them to host memory, from where their next calls fetch them."""
    for module in list(_known):
        _send_away(module)
    where = device()
    if where.type != "cpu":
        torch.get_device_module(where).empty_cache()


def _send_away(module: nn.Module) -> None:
    if module in _known:
        _known.discard(module)
        with torch.inference_mode(False):
            module.to("cpu")
