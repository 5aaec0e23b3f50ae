"""Which of a run's blocks wait in host memory on a card, what that takes, and what to say of it; from a dry run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .config import AUTO, NONE, TrainingConfig
from .counted import Counted
from .memory import advice, size
from .streaming import BUFFERS, spread

# What CUDA takes for itself on a card, before the first tensor.
CONTEXT = int(0.8 * 2**30)
# Of the free memory this share is left alone: the allocator cannot use every gap, and kernels want some room.
MARGIN = 0.05
# What may wait in host memory besides, and that no graph waits beside another (`Objective.graphs_wait`), at some calls.
INPUTS, STATE = "block inputs", "idle optimiser states"
ALONE = "one graph at a time"
# In the order in which they are taken; none changes a number of the run.
MEASURES = ((INPUTS,), (INPUTS, STATE))
WITH_GRAPHS = ((ALONE,), *MEASURES, (ALONE, INPUTS, STATE))
# Bytes a second over PCIe 4 x16 from pinned memory, as cards of that kind reach it; until a run has measured its own.
BUS = 25e9


@dataclass(frozen=True)
class Plan:
    """What a run takes with so many of its blocks streamed.

    peak: bytes on the card; host: bytes of host memory that the streamed blocks take, and what else waits there.
    measures: see `WITH_GRAPHS`. free, host_free: what there is, None where nobody knows. seconds: of a step, None where
    nobody knows how fast the card is. waits: how many of them are spent on copies that the arithmetic does not hide,
    None likewise.
    """

    streamed: int
    blocks: int
    peak: int
    host: int
    free: int | None = None
    host_free: int | None = None
    seconds: float | None = None
    waits: float | None = None
    measures: tuple[str, ...] = ()

    @property
    def on_card(self) -> bool:
        """Whether the card has room."""
        return self.free is None or self.peak <= usable(self.free)

    @property
    def in_host(self) -> bool:
        """Whether host memory has room."""
        return self.host_free is None or self.host <= self.host_free

    @property
    def fits(self) -> bool:
        """Whether card and host have room."""
        return self.on_card and self.in_host

    def __str__(self) -> str:
        parts = []
        if self.streamed:
            parts.append(f"{self.streamed} of {self.blocks} blocks streamed")
        else:
            parts.append("the base stays on the card")
        parts += [measure if measure == ALONE else f"{measure} in host memory" for measure in self.measures]
        if self.host:
            parts.append(f"{size(self.host)} of host memory")
        parts.append(f"peak about {size(self.peak)}")
        if self.seconds is not None:
            parts.append(f"about {_shortly(self.seconds)} s a step")
        if self.streamed and self.waits is not None:
            adds = f"transfer adds about {_shortly(self.waits)} s a step"
            parts.append(adds if self.waits else "transfer hidden")
        return ", ".join(parts)


def _shortly(seconds: float) -> str:
    return f"{seconds:.{0 if seconds >= 10 else 2}f}"


def usable(free: int) -> int:
    """What of a card's free memory a plan may fill."""
    return int(free * (1 - MARGIN))


@dataclass(frozen=True)
class Forecast:
    """A counted run on one machine.

    free, host_free: bytes, None where they are not known. speed: operations a second that the card reaches, None where
    nobody measured; bus: bytes a second from host memory to the card. context: bytes to add for what CUDA takes, where
    `free` is a whole card. factor: measured bytes over counted ones on this machine. measures: with which it was
    counted; more: the same run with others, in order.
    """

    counted: Counted
    training: TrainingConfig
    free: int | None = None
    host_free: int | None = None
    speed: float | None = None
    bus: float = BUS
    context: int = 0
    factor: float = 1.0
    measures: tuple[str, ...] = ()
    waiting: int = 0  # bytes that these keep in host memory
    more: tuple[tuple[tuple[str, ...], Counted], ...] = ()

    @property
    def settled(self) -> Forecast:
        """With as few measures as fit: none, where streaming alone does; all of them, where nothing does.

        Those that move no states go first where the base then stays on the card: block inputs are moved twice in a
        step, and a block thrice.
        """
        able = [self, *self._further()]
        resident = (one for one in able if STATE not in one.measures and one.plan.fits and not one.plan.streamed)
        fitting = (one for one in able if one.plan.fits)
        on_card = (one for one in able if one.plan.on_card)
        return next(resident, None) or next(fitting, None) or next(on_card, able[-1])

    def _further(self) -> list[Forecast]:
        """The same run with each of the other measures."""
        whole = {ALONE in measures: counted for measures, counted in [*self.more, (self.measures, self.counted)]
                 if not {INPUTS, STATE} & {*measures}}  # fmt: skip
        found = []
        for measures, counted in self.more:
            away = {INPUTS, STATE} & {*measures}
            before = whole.get(ALONE in measures, self.counted).beside
            waiting = max(0, before - counted.beside) if away else 0
            found.append(replace(self, counted=counted, measures=measures, more=(), waiting=waiting))
        return found

    def peak(self, streamed: int) -> int:
        """Bytes on the card at the most: what stays there, the buffers, and all beside the base."""
        return int(self.base(streamed) + self.counted.beside * self.factor) + self.context

    def first(self, streamed: int) -> int:
        """The same in a run's first step, which has no optimiser's state before its player moves."""
        return int(self.base(streamed) + self.counted.first * self.factor) + self.context

    def base(self, streamed: int) -> int:
        """Bytes of the frozen base on the card, and of the buffers through which the rest passes."""
        away = self._away(streamed)
        return self.counted.base - sum(away) + min(len(away), BUFFERS) * max(away, default=0)

    def _away(self, streamed: int) -> list[int]:
        return [self.counted.blocks[i] for i in spread(streamed, len(self.counted.blocks))]

    def with_streamed(self, streamed: int) -> Plan:
        """The plan with so many blocks streamed."""
        away = sum(self._away(streamed))
        seconds = waits = None
        if self.speed is not None:
            seconds = self.operations / self.speed
            # A pass enters each block once, and a pass with a graph once more on the way back.
            visits = sum(n * (2 if phase.endswith("forward") else 1) for phase, n in self.counted.calls.items())
            waits = max(0.0, self._repeats * away * visits / self.bus - seconds)
            seconds += waits
        blocks, host = len(self.counted.blocks), away + self.waiting
        return Plan(
            streamed, blocks, self.peak(streamed), host, self.free, self.host_free, seconds, waits, self.measures
        )

    @property
    def operations(self) -> float:
        """Of a step with all of its accumulated batches."""
        return self._repeats * self.counted.operations

    @property
    def _repeats(self) -> float:
        """How often a step does what was counted, of which accumulated batches are two at most."""
        return max(1, self.training.accumulation) / min(2, max(1, self.training.accumulation))

    def timed(self, seconds: float, bus: float | None) -> Forecast:
        """The forecast by what a step's arithmetic took, and by how fast copies were, None where nobody measured."""
        speed = self.operations / max(seconds, 1e-6)
        return replace(self, speed=speed or None, bus=bus or self.bus)

    @property
    def plan(self) -> Plan:
        """As many streamed blocks as `offload` says; with auto the fewest that fit, and all where none does."""
        training, blocks = self.training, len(self.counted.blocks)
        if training.offload == NONE or not training.gradient_checkpointing:
            return self.with_streamed(0)
        if training.offload != AUTO:
            return self.with_streamed(min(int(training.offload), blocks))
        if self.free is None:
            return self.with_streamed(0)
        room = usable(self.free)
        return self.with_streamed(next((n for n in range(blocks) if self.peak(n) <= room), blocks))


def corrected(forecast: Forecast, streamed: int, measured: int, anew: bool) -> tuple[Forecast, int]:
    """(the forecast by what a run's first step took with so many blocks streamed, how many had better be).

    anew: the run had no optimisers' state before that step. Blocks come back to the card only where the forecast was
    wrong by more than its margin.
    """
    base = forecast.base(streamed)
    told = forecast.first(streamed) if anew else forecast.peak(streamed)
    counted = max(1, told - forecast.context - base)
    factor = max(0.1, forecast.factor * (measured - base) / counted)
    found = replace(forecast, factor=factor)
    if forecast.training.offload != AUTO or not forecast.training.gradient_checkpointing:
        return found, streamed
    wanted = found.plan.streamed
    low = found.peak(streamed) < forecast.peak(streamed) * (1 - MARGIN)
    return found, wanted if wanted > streamed or low else streamed


def on_cards(
    counted: Counted,
    training: TrainingConfig,
    cards: Sequence[int],
    more: tuple[tuple[tuple[str, ...], Counted], ...] = (),
) -> list[tuple[int, Plan]]:
    """(GB, plan) for cards of so many GB that have nothing else to hold. more: see Forecast."""
    return [
        (card, Forecast(counted, training, card * 2**30, context=CONTEXT, more=more).settled.plan) for card in cards
    ]


def problem(plan: Plan, training: TrainingConfig) -> str | None:
    """What to tell the user when a run does not fit, else None."""
    if plan.free is not None and not plan.on_card:
        return (
            f"this run needs about {size(plan.peak)} on the card ({plan}), of which {size(usable(plan.free))} can be "
            f"used: {advice(training)}"
        )
    if plan.host_free is not None and not plan.in_host:
        return (
            f"this run needs {size(plan.host)} of host memory ({plan}), and there are {size(plan.host_free)} for it: "
            "close other programs, or use a base in fewer bits (fp8)"
        )
    return None


class Truth:
    """What torch measures on a device, beside what lay there when this was made; None where it measures nothing."""

    def __init__(self, device: torch.device):
        module = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
        names = ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats")
        self._device = device
        self._module = module if module is not None and all(hasattr(module, name) for name in names) else None
        self._before = self._module.memory_allocated(device) if self._module else 0

    @property
    def size(self) -> int:
        """All bytes of the device; 0 where torch does not say."""
        can = self._module is not None and hasattr(self._module, "mem_get_info")
        return int(self._module.mem_get_info(self._device)[1]) if can else 0  # type: ignore[union-attr]

    def begin(self) -> None:
        """Forget the peak so far."""
        if self._module:
            self._module.reset_peak_memory_stats(self._device)

    @property
    def peak(self) -> int | None:
        """The most bytes since `begin`."""
        return None if self.highest is None else self.highest - self._before

    @property
    def highest(self) -> int | None:
        """The same with all else that torch holds there for this process."""
        return self._module.max_memory_allocated(self._device) if self._module else None
