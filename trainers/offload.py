"""How much of the frozen base waits in host memory: what the user asks for, and what is done when memory ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from .streaming import Ring

AUTO, NONE = "auto", "none"
Outcome = TypeVar("Outcome")


def checked(offload: str, checkpoints: bool) -> None:
    """ValueError for anything but auto, none and a number of blocks, and for a number without checkpoints."""
    if offload in (AUTO, NONE):
        return
    if not (offload.isascii() and offload.isdigit() and len(offload) <= 5):
        raise ValueError(f"offload must be auto, none or a number of blocks such as 20, got {offload!r:.40}")
    if int(offload) and not checkpoints:
        raise ValueError(
            f"offload {offload} needs gradient_checkpointing: a block's weights leave the device before the backward "
            "pass, which computes the block again when they are back; turn it on, or set offload to none"
        )


def blocks_to_stream(offload: str, checkpoints: bool, blocks: int, weights: int, beside: int, free: int | None) -> int:
    """How many of a network's blocks are streamed.

    weights: bytes of the whole base, none of which is on the device yet; beside: bytes that the run needs besides, as
    far as that is known; free: bytes on the device, None where it is not known and where there is none.
    """
    if offload == NONE:
        return 0
    if offload != AUTO:
        return min(int(offload), blocks)
    fits = free is None or weights + beside <= free
    return 0 if fits or not checkpoints else blocks


def with_more_room(step: Callable[[], Outcome], ring: Ring | None, ran_out: Callable[[BaseException], bool],
                   before_again: Callable[[], None], says: Callable[[str], None]) -> Outcome:
    """Do something, once more with a quarter of the blocks streamed besides as often as memory ends meanwhile.

    before_again: lets go of what was left. Raises what `step` does when nothing is left to be streamed.
    """
    while True:
        try:
            return step()
        except (RuntimeError, MemoryError) as error:
            if ring is None or not ran_out(error) or ring.count == len(ring.blocks):
                raise
        # Here nothing refers to the error any longer, which would hold on to all that was being computed.
        assert ring is not None
        before_again()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        ring.more()
        says(f"memory ran out: {ring.count} of {len(ring.blocks)} blocks are streamed from host memory from now on")
