"""Copies of a block's weights from host memory to a device, beside what the device computes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .masters import Master

STAGES = 2  # pinned buffers through which masters go that cannot be pinned themselves
TIMED = 8  # copies, the first ones, whose time is taken


class Copies:
    """Copies from host memory to a device, beside its computing where the device has streams of its own."""

    def __init__(self, device: torch.device, largest: int):
        self.device, self.largest = device, largest
        self.stream = stream_of(device)
        self._worker: ThreadPoolExecutor | None = None
        self._staging: list[tuple[Tensor, Any]] = []
        self._timed: list[tuple[int, Any, Any]] = []
        self._gathering = 0.0

    @property
    def speed(self) -> float | None:
        """Bytes a second that the first copies reached, None where nothing measures them; ask when they have ended."""
        copying = elapsed((begun, done) for _, begun, done in self._timed)
        spent = max(copying, self._gathering)  # one goes on beside the other
        return sum(size for size, *_ in self._timed) / spent if spent > 0 else None

    def empty(self, size: int) -> Tensor:
        """Bytes on the device that nobody else uses."""
        if self.stream is None:
            return torch.empty(size, dtype=torch.uint8, device=self.device)
        # Always the same size, and always from the copying stream's memory: what one block gives back, the next takes.
        with on(self.stream):
            return torch.empty(self.largest, dtype=torch.uint8, device=self.device)

    def begin(self, master: Master, flat: Tensor) -> Arrival:
        """Copy a master into fresh device memory, after all work that the device has been given so far."""
        if self.stream is None:
            master.copy_to(flat)
            return Arrival()
        # The memory may have been another block's: whatever still reads that has been queued before this moment.
        queued = torch.accelerator.current_stream(self.device).record_event()
        if master.pinned:
            return Arrival(event=self._copy(master, flat, queued, None))
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="retort-staging")
        # The thread lets go of its arguments a moment after the copy's end: it takes the memory out of this list.
        return Arrival(staged=self._worker.submit(self._stage, master, [flat], queued))

    def _copy(self, source: Master | Tensor, flat: Tensor, queued: Any, event: Any) -> Any:
        assert self.stream is not None
        with torch.no_grad(), on(self.stream):
            self.stream.wait_event(queued)
            begun = moment(self.device) if len(self._timed) < TIMED else None
            if isinstance(source, Tensor):
                size = source.numel()
                flat[:size].copy_(source, non_blocking=True)
            else:
                size = source.size
                source.copy_to(flat, non_blocking=True)
            if begun is not None:
                self._timed.append((size, begun, moment(self.device)))
            return self.stream.record_event(event)

    def _stage(self, master: Master, given: list[Tensor], queued: Any) -> Any:
        """Through pinned memory, in the worker's thread: what cannot be pinned itself would halt the device."""
        flat = given.pop()
        with torch.inference_mode(False), torch.no_grad():
            if len(self._staging) < STAGES:
                pinned, done = torch.empty(self.largest, dtype=torch.uint8, pin_memory=True), None
            else:
                pinned, done = self._staging.pop(0)
                done.synchronize()  # its last copy to the device
            began = time.perf_counter()
            master.copy_to(pinned)
            if len(self._timed) < TIMED:
                self._gathering += time.perf_counter() - began
            done = self._copy(pinned[: master.size], flat, queued, done)
            self._staging.append((pinned, done))
            return done

    def close(self) -> None:
        """Wait for what is under way, so that the device reads none of this memory any longer, and end the thread."""
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = None
        if self.stream is not None:
            self.stream.wait_event(torch.accelerator.current_stream(self.device).record_event())
            self.stream.synchronize()
        self._staging.clear()


class Arrival:
    """When a block's weights are there: at once, at an event, or at one that a thread has yet to record."""

    def __init__(self, event: Any = None, staged: Future[Any] | None = None):
        self._event, self._staged = event, staged

    def wait(self, device: torch.device) -> None:
        """Let the device's work from here on wait for them; raises what copying raised."""
        if self._staged is not None:
            self._event, self._staged = self._staged.result(), None
        if self._event is not None:
            torch.accelerator.current_stream(device).wait_event(self._event)
            self._event = None

    def left(self) -> None:
        """Wait until no thread holds their memory any longer; whether they are there is nobody's concern."""
        if self._staged is not None:
            wait([self._staged])


def stream_of(device: torch.device) -> Any:
    """A stream for copies, None on devices that have none: they copy in turn with their other work."""
    if device.type == "cpu":
        return None
    try:
        stream = torch.Stream(device=device)
        stream.record_event()
        return stream
    except (RuntimeError, NotImplementedError):
        return None


def moment(device: torch.device) -> Any:
    """An event in the device's current stream from which time can be measured, None where it measures none."""
    try:
        made = torch.Event(device=device, enable_timing=True)
        made.record()
    except (RuntimeError, NotImplementedError, TypeError):
        return None
    return made


def elapsed(spans: Iterable[tuple[Any, Any]]) -> float:
    """Seconds within pairs of moments that the device has passed."""
    return float(sum(begun.elapsed_time(done) for begun, done in spans)) / 1e3


@contextmanager
def on(stream: Any) -> Iterator[None]:
    before, device = torch.accelerator.current_stream(stream.device), torch.accelerator.current_device_index()
    torch.accelerator.set_stream(stream)  # makes its device the current one
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)
        torch.accelerator.set_device_index(device)
