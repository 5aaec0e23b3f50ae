"""How much of the frozen base waits in host memory, decided before it is on the device and when memory ends there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from .config import AUTO, NONE, TrainingConfig
from .memory import Estimate, ran_out, too_much
from .streaming import Ring

Outcome = TypeVar("Outcome")


def blocks_to_stream(config: TrainingConfig, blocks: int, weights: int, free: int | None) -> int:
    """How many of a network's blocks are streamed from the beginning.

    weights: bytes of the base, none of which is on the device yet. free: bytes on the device, None where there is none.
    """
    if config.offload not in (AUTO, NONE):
        return min(int(config.offload), blocks)
    fits = free is None or weights <= free
    return 0 if fits or config.offload == NONE or not config.gradient_checkpointing else blocks


def settled(
    ring: Ring | None, estimate: Callable[[], Estimate], free: Callable[[], int | None], config: TrainingConfig
) -> tuple[Estimate, str | None]:
    """What a run will need beside its weights, and what to tell the user where that does not fit.

    With auto all blocks are streamed before that is said.
    """

    def tried() -> tuple[Estimate, str | None]:
        found, left = estimate(), free()
        return found, None if left is None else too_much(found, left, config)

    if ring is None or config.offload != AUTO or not config.gradient_checkpointing or ring.count == len(ring.blocks):
        return tried()
    try:
        found, problem = tried()
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        problem = "memory ran out"
    if problem:
        ring.stream(len(ring.blocks))
        forget_unused(ring.device)
        return tried()
    return found, None


def enough_room(
    work: Callable[[], Outcome],
    spare: Callable[[], Ring | None],
    before_again: Callable[[], None],
    says: Callable[[str], None],
) -> Outcome:
    """Do something; whenever memory ends meanwhile, once more, with a quarter of the blocks streamed besides.

    spare: the ring, None when nothing can be begun again. before_again: lets go of what was left. Raises what `work`
    does where no more can be streamed.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            ring = spare()
            if ring is None or not ran_out(error) or ring.count == len(ring.blocks):
                raise
        # By now nothing refers to the error, which held on to all that was being computed.
        before_again()
        forget_unused(ring.device)
        ring.more()
        says(f"memory ran out: {ring.count} of {len(ring.blocks)} blocks are streamed from host memory from now on")


def forget_unused(device: torch.device) -> None:
    """Give memory that torch keeps for later back to the device."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
