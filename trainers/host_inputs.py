"""What checkpointed blocks are given, in host memory between the forward and the backward pass.

A video's block inputs are the largest part of what training needs: 13 GB for Wan 14B at 480p and 81 frames. Hooks on
saved tensors see them, since checkpoints are given their tensors by position; what a block saves inside a checkpoint
they do not see. The copies out and back are beside the device's computing where it has streams. Nothing is rounded.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .transfers import on, stream_of

# Smaller ones stay: sixty blocks of a picture's come to a gigabyte at most, which is soon spared elsewhere.
LEAST = 16 * 2**20


class HostInputs:
    """Moves what autograd keeps of `least` bytes or more to host memory, within `watching`.

    moved: bytes so far. Recomputation and backward may run in a thread of autograd's own.
    """

    def __init__(self, device: torch.device, least: int = LEAST):
        self.device, self.least, self.moved = device, least, 0
        self._stream = stream_of(device)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """One call of the network; what it keeps comes back for its backward pass."""
        order: list[weakref.ref[_Away]] = []
        seen: dict[int, tuple[weakref.ref[Any], tuple[Any, ...], weakref.ref[_Away]]] = {}

        def pack(tensor: Tensor) -> _Away | _Here:
            if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.device.type != self.device.type:
                return _Here(tensor)
            if tensor.numel() * tensor.element_size() < self.least or tensor.is_leaf and tensor.requires_grad:
                return _Here(tensor)
            # Blocks are given some tensors in common, positions above all: one copy does for all of them.
            storage = tensor.untyped_storage()
            place = tensor.data_ptr()
            what = (tensor.dtype, tensor.shape, tensor.stride(), tensor._version)
            known = seen.get(place)
            if known is not None and known[0]() is storage and known[1] == what and (away := known[2]()) is not None:
                return away
            away = _Away(tensor, self._stream, order)
            self.moved += tensor.numel() * tensor.element_size()
            seen[place] = weakref.ref(storage), what, weakref.ref(away)
            return away

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.back()):
            yield
        seen.clear()


class _Here:
    """A tensor that stays where it is."""

    def __init__(self, tensor: Tensor):
        # Not the tensor itself: one that is its own operation's output would keep itself alive for ever.
        self._tensor, self._version = tensor.detach(), tensor._version

    def back(self) -> Tensor:
        """The tensor. RuntimeError where it was written to, as autograd without hooks has it."""
        if self._tensor._version != self._version:
            raise RuntimeError("one of the variables needed for gradient computation has been modified in place")
        return self._tensor


class _Away:
    """A tensor's copy in host memory, and where it stands among those of its pass."""

    def __init__(self, tensor: Tensor, stream: Any, order: list[weakref.ref[_Away]]):
        self._stream, self._device, self._order, self._place = stream, tensor.device, order, len(order)
        order.append(weakref.ref(self))
        self._here: Tensor | None = None  # on its way back
        self._arrived: Any = None
        self._last: weakref.ref[Tensor] | None = None
        tensor = tensor.detach()
        with torch.no_grad():
            # Memory that the device reaches by itself; strides too come back as they were.
            self._host = torch.empty_like(tensor, device="cpu", pin_memory=stream is not None)
            if stream is None:
                self._host.copy_(tensor)
                return
            made = torch.accelerator.current_stream(self._device).record_event()
            with on(stream):
                stream.wait_event(made)
                self._host.copy_(tensor, non_blocking=True)
            # What it leaves on the device is not given to anybody before the copy is made.
            tensor.record_stream(stream)

    def send(self) -> None:
        """Begin its way back."""
        if self._here is not None or (self._last is not None and self._last() is not None):
            return
        with torch.inference_mode(False), torch.no_grad():
            if self._stream is None:
                self._here = torch.empty_like(self._host, device=self._device).copy_(self._host)
                return
            with on(self._stream):
                self._here = torch.empty_like(self._host, device=self._device, pin_memory=False)
                self._here.copy_(self._host, non_blocking=True)
                self._arrived = self._stream.record_event()

    def back(self) -> Tensor:
        """The tensor on its device; the one that the backward pass needs next is sent for."""
        here = None if self._last is None else self._last()
        if here is None:
            self.send()
            here, self._here = self._here, None
            assert here is not None
            if self._arrived is not None:
                current = torch.accelerator.current_stream(self._device)
                current.wait_event(self._arrived)
                here.record_stream(current)
                self._arrived = None
            self._last = weakref.ref(here)
        before = self._order[self._place - 1]() if self._place else None
        if before is not None and self._stream is not None:
            before.send()
        return here
