"""How much of the frozen base waits in host memory, decided before it is on the device and when memory ends there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from . import checkpointing, planning
from .config import AUTO, NONE, TrainingConfig
from .denoiser import Denoiser
from .masters import Pin, Unpin
from .memory import ran_out
from .planning import Forecast
from .streaming import MORE, Ring

Outcome = TypeVar("Outcome")


def blocks_to_stream(config: TrainingConfig, blocks: int, weights: int, free: int | None) -> int:
    """How many of a network's blocks are streamed from the beginning.

    weights: bytes of the base, none of which is on the device yet. free: bytes on the device, None where there is none.
    """
    if config.offload not in (AUTO, NONE):
        return min(int(config.offload), blocks)
    fits = free is None or weights <= free
    return 0 if fits or config.offload == NONE or not config.gradient_checkpointing else blocks


def placed(
    denoiser: Denoiser, count: int, pin: Pin, unpin: Unpin, config: TrainingConfig, says: Callable[[str], None]
) -> None:
    """Bring the network to its device but for `count` blocks; for a quarter more where memory ends, which others may
    have taken meanwhile. Raises what the device does where no more can be streamed.
    """
    blocks = len(checkpointing.units(denoiser.network))
    while True:
        try:
            return denoiser.place(count, pin, unpin)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error) or count >= blocks or config.offload == NONE or not config.gradient_checkpointing:
                raise
        forget_unused(denoiser.device)
        count = min(blocks, count - (-blocks // MORE))
        says(f"memory ran out: {count} of {blocks} blocks are streamed from host memory from now on")


def enough_room(
    work: Callable[[], Outcome],
    spare: Callable[[], Ring | None],
    graphs: Callable[[], bool],
    before_again: Callable[[], None],
    says: Callable[[str], None],
) -> Outcome:
    """Do something; whenever memory ends meanwhile, once more with less of it taken.

    First graphs no longer wait beside others, then a quarter of the blocks is streamed besides; neither changes a
    number. spare: the ring, None when nothing can be begun again. graphs: lets no graph wait from now on; False where
    none did, or nothing can be begun again. before_again: lets go of what was left. Raises what `work` does where no
    more room can be made.
    """
    while True:
        try:
            return work()
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            alone, ring = graphs(), spare()
            if not alone and (ring is None or ring.count == len(ring.blocks)):
                raise
        # By now nothing refers to the error, which held on to all that was being computed.
        before_again()
        if alone:
            says(f"memory ran out: {planning.ALONE} is kept from now on")
        elif ring is not None:
            ring.more()
            says(f"memory ran out: {ring.count} of {len(ring.blocks)} blocks are streamed from host memory from now on")


def corrected(
    forecast: Forecast | None,
    ring: Ring | None,
    spare: Ring | None,
    measured: int | None,
    seconds: float,
    anew: bool,
    says: Callable[[str], None],
) -> Forecast | None:
    """The forecast by what an attempt's first step took, after which as many blocks are streamed as that asks for.

    spare: the ring where more may be streamed now, else None. measured: bytes, None where nothing measures them.
    seconds: of the step. anew: nothing was trained before it. Where memory ends for blocks that come back, they stay in
    host memory.
    """
    if forecast is None or ring is None or measured is None:
        return forecast
    bus, waited = ring.pace()
    found, count = planning.corrected(forecast.timed(seconds - waited, bus), ring.count, measured, anew)
    if spare is not None and count != ring.count:
        try:
            ring.stream(count)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
        forget_unused(ring.device)
    says(f"memory after the first step: {found.with_streamed(ring.count)}")
    return found


def forget_unused(device: torch.device) -> None:
    """Give memory that torch keeps for later back to the device."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
