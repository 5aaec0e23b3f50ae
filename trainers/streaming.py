"""The frozen base in host memory, and its blocks on the device only while they compute.

A streamed block's weights stay in host memory (`masters`). `enter`, the first thing in the function
that is checkpointed, brings them: forward pass and recomputation both go through it, so that no hook of the backward
pass is needed, and the direction in which the next block is fetched follows from the entries themselves.

Nothing on the device is ever written to twice. Each fetch takes memory of its own, and what a block leaves behind goes
back to torch's allocator when nobody refers to it any longer, autograd included: a graph that outlives its block costs
memory, and never numbers. With checkpoints none does, and two buffers' worth are in use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpointing
from .masters import Master, Pin, Unpin, Weight, places, size_of, streamable
from .transfers import Arrival, Copies, elapsed, moment

BUFFERS = 2
MORE = 4  # after memory ran out, one of so many blocks is streamed besides


def spread(count: int, among: int) -> list[int]:
    """`count` of the numbers below `among`, evenly spaced, so that blocks that stay give the others time to come."""
    count = max(0, min(count, among))
    return [(2 * i + 1) * among // (2 * count) for i in range(count)]


@dataclass
class Block:
    """One block of the network: streamed, or on the device for good.

    master: its weights in host memory while it is streamed.
    """

    name: str
    module: nn.Module
    weights: list[Weight]
    size: int
    streamed: bool = False
    master: Master | None = None


class Ring:
    """Streams `count` of a network's blocks (`checkpointing.units`) through memory on a device.

    The network comes frozen, its adapters in place and its blocks not yet checkpointed, and lies in host memory;
    whatever is not streamed is moved to the device. buffers: blocks of weights on the device at once, 2 to fetch one
    while another computes, or 1. pin: makes host memory such that the device fetches from it by itself, and says
    whether it did; unpin undoes that. ValueError for a network that has no blocks. Only `close` lets go of it all.
    """

    def __init__(
        self,
        network: nn.Module,
        device: torch.device,
        count: int,
        *,
        buffers: int = BUFFERS,
        pin: Pin | None = None,
        unpin: Unpin | None = None,
    ):
        if device.type != "cpu" and device.index is None:
            device = torch.device(device.type, torch.accelerator.current_device_index())
        self.device, self.buffers = device, buffers
        self.copies = 0  # from host memory to the device so far
        self.late = 0  # of these, how many began only when their block was entered
        self._pin, self._unpin = pin, unpin
        self._lock = threading.RLock()  # backward runs on a thread of autograd's own
        self._copying: Copies | None = None
        self._waits: list[tuple[Any, Any]] | None = None  # of the device for a block's weights
        self._here: dict[int, tuple[Tensor, Arrival]] = {}  # by block; the one entered last is at the end
        self._bound: int | None = None
        found = checkpointing.units(network)
        weights = streamable(network, [module for _, module in found])
        self.blocks = [
            Block(name, module, own, sum(size_of(weight.tensor) for weight in own))
            for (name, module), own in zip(found, weights, strict=True)
            if own
        ]
        if count and not self.blocks:
            raise ValueError(
                f"{type(network).__name__} has no list of blocks whose weights can be moved, so that none can be "
                "streamed: set offload to none"
            )
        try:
            self._move_rest(network)
            self.stream(count)
            for number, block in enumerate(self.blocks):
                checkpointing.precede(block.module, self._entering(number, block.module))
        except BaseException:
            self.close()
            raise

    # ---- which blocks are streamed ---------------------------------------------------------------

    @property
    def count(self) -> int:
        """How many blocks are streamed."""
        return sum(block.streamed for block in self.blocks)

    @property
    def streamed_bytes(self) -> int:
        """Bytes of weights that are in host memory instead of on the device."""
        return sum(block.size for block in self.blocks if block.streamed)

    def _move_rest(self, network: nn.Module) -> None:
        """To the device: all that is in no block or cannot be streamed; adapters stay the objects that they are."""
        within = {owner for block in self.blocks for weight in block.weights for owner in weight.owners}
        for named in places(network).values():
            owners = [owner for _, owner in named]
            if owners[0] in within:
                continue
            weight = Weight(named[0][0], owners)
            if weight.tensor.device == self.device or weight.tensor.is_meta:
                continue
            if weight.tensor.requires_grad or "lora_" in weight.name:
                moved = nn.Parameter(weight.tensor.detach().to(self.device), requires_grad=weight.tensor.requires_grad)
                torch.utils.swap_tensors(weight.tensor, moved)  # whoever holds it holds the one that has moved
            else:
                weight.put(nn.Parameter(weight.tensor.detach().to(self.device), requires_grad=False))
        for module in network.modules():
            for key, buffer in module.named_buffers(recurse=False):
                if buffer.device != self.device and not buffer.is_meta:
                    setattr(module, key, buffer.to(self.device))

    def stream(self, count: int) -> None:
        """Stream so many blocks, evenly spaced; not while a pass or a graph is under way.

        What torch raises when memory ends leaves the ring usable, with more blocks streamed than were asked for.
        """
        chosen = set(spread(count, len(self.blocks)))
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._forget()
            pin = self._pin
            try:
                for number in sorted(chosen):
                    if not self._stream_block(self.blocks[number], pin):
                        pin = None  # who has refused once has no more to give
                for number, block in enumerate(self.blocks):
                    if number not in chosen:
                        self._keep_block(block)
            finally:
                self._begin_anew()

    def more(self) -> bool:
        """Stream a quarter of the blocks more, after memory ran out; False when all are streamed already."""
        before = self.count
        if before == len(self.blocks):
            return False
        self.stream(before - (-len(self.blocks) // MORE))
        return True

    def _stream_block(self, block: Block, pin: Pin | None) -> bool:
        """Whether the device fetches it by itself."""
        if block.master is None:
            block.master = Master(block.weights, pin, self._unpin)
        block.streamed = True
        return block.master.pinned

    def _keep_block(self, block: Block) -> None:
        if block.streamed:
            assert block.master is not None
            if self.device.type == "cpu":
                block.master.put_back()
            else:
                flat = torch.empty(block.master.size, dtype=torch.uint8, device=self.device)
                block.master.copy_to(flat)
                block.master.put(flat)
            block.streamed = False
            block.master.let_go()
            block.master = None
            return
        for weight in block.weights:
            if weight.tensor.device != self.device:
                weight.put(nn.Parameter(weight.tensor.detach().to(self.device), requires_grad=False))

    def _begin_anew(self) -> None:
        """Expect the streamed blocks in the order in which the network lists them, until it has gone through them."""
        self._order = [number for number, block in enumerate(self.blocks) if block.streamed]
        self._seen = 0
        self._last: int | None = None
        self._down = False
        self._copying = None
        self._waits = None if self.device.type == "cpu" else []
        if self._order:
            largest = max(block.master.size for block in self.blocks if block.streamed and block.master)
            self._copying = Copies(self.device, largest)

    def pace(self) -> tuple[float | None, float]:
        """(bytes a second of the copies, None where nothing measures them; seconds that the device waited for them).

        Of the time since `stream`, once its work has ended. From now on no more time is taken.
        """
        with self._lock:
            waits, self._waits = self._waits or [], None
            return (self._copying.speed if self._copying else None), elapsed(waits)

    def _forget(self) -> None:
        """Leave nothing of a streamed block on the device."""
        self._unbind()
        if self._copying is not None:
            self._copying.close()
        self._here.clear()

    # ---- passes ----------------------------------------------------------------------------------

    def _entering(self, number: int, module: nn.Module) -> Callable[[], None]:
        def first() -> None:
            if self.blocks[number].streamed:
                if torch.is_grad_enabled() and not checkpointing.checkpointed(module):
                    raise RuntimeError(
                        "streamed blocks must be checkpointed where gradients are wanted: turn gradient_checkpointing "
                        "on, or set offload to none"
                    )
                self.enter(number)

        return first

    def enter(self, number: int) -> None:
        """Put a streamed block's weights on the device and in their places, and send for those of the next.

        The first thing in what a checkpoint runs again. Raises what torch does when memory ends.
        """
        graph = torch.is_grad_enabled()
        with self._lock, torch.inference_mode(False), torch.no_grad():
            following = self._following(number, graph)
            here = self._here.pop(number, None)
            if here is None:
                self.late += 1
                self._unbind()
                self._evict(self.buffers - 1)
                here = self._fetch(number)
            self._here[number] = here
            before = None if self._waits is None else moment(self.device)
            here[1].wait(self.device)
            if before is not None and self._waits is not None:
                self._waits.append((before, moment(self.device)))
            if self._bound != number:
                self._unbind()
                master = self.blocks[number].master
                assert master is not None
                master.put(here[0])
                self._bound = number
            if following is not None and following not in self._here and self.buffers > 1:
                self._evict(self.buffers - 1)
                self._here = {following: self._fetch(following), **self._here}

    def _following(self, number: int, graph: bool) -> int | None:
        """The block that will probably be entered next, None where what is here already will do.

        A step to the block before, or to the same one again, is a backward pass's recomputation; a longer way back to
        the first is a new pass.
        """
        place = self._order.index(number)
        if place >= self._seen:  # the first time: the network's own order is the one in which it goes through them
            self._order.insert(self._seen, self._order.pop(place))
            place = self._seen
            self._seen += 1
        last, self._last = self._last, place
        self._down = last is not None and (last - 1 <= place <= last or 0 < place < last)
        if self._down:
            return self._order[place - 1] if place else None
        if place + 1 < len(self._order):
            return self._order[place + 1]
        # From the last one a graph goes back the way it came; without one, the next pass begins.
        return None if graph else self._order[0]

    def _fetch(self, number: int) -> tuple[Tensor, Arrival]:
        master = self.blocks[number].master
        assert master is not None and self._copying is not None
        self.copies += 1
        flat = self._copying.empty(master.size)
        return flat, self._copying.begin(master, flat)

    def _evict(self, most: int) -> None:
        """Let go of all but so many blocks' weights, first what was fetched and not entered, then the oldest."""
        while len(self._here) > most:
            number = next(iter(self._here))
            if number == self._bound:
                self._unbind()
            self._here.pop(number)[1].left()

    def _unbind(self) -> None:
        if self._bound is not None:
            master = self.blocks[self._bound].master
            assert master is not None
            master.put_away()
            self._bound = None

    def close(self) -> None:
        """Put the streamed weights back into their places, in host memory, and let go of everything."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._forget()
            for block in self.blocks:
                checkpointing.unprecede(block.module)
                if block.master is not None:
                    if block.streamed:
                        block.master.put_back()
                    block.master.let_go()
            self.blocks = []
            self._order = []
            self._copying = None
