"""A training step without numbers: what it takes in memory by phase, and how much arithmetic, before a weight is loaded.

Everything that counts is the real thing: the network's own modules, adapters, checkpoints, the method's passes, clipping
and the optimiser. Only the weights are missing (`weightless`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpointing
from .denoiser import Denoiser
from .loop import Trainer
from .players import Runner
from .tracker import Tracker
from .weightless import as_on_the_card

OPTIMISER = "optimiser"


@dataclass(frozen=True)
class Counted:
    """Bytes and operations of one step.

    base: of the frozen weights; blocks: those of each block among them, in order. adapters: of the trained weights;
    state: of the optimisers. peaks: by phase, everything that is alive beyond base, adapters and state. flops, calls:
    operations, and calls of the network, by phase.
    """

    base: int
    blocks: tuple[int, ...]
    adapters: int
    state: int
    peaks: dict[str, int]
    flops: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    @property
    def beside(self) -> int:
        """The most that is alive beyond the base."""
        return self.adapters + self.state + max(self.peaks.values())

    @property
    def phase(self) -> str:
        """Where the most is alive."""
        return max(self.peaks, key=lambda name: self.peaks[name])


def frozen_bytes(tracker: Tracker, module: nn.Module) -> int:
    """Bytes of a module's weights and buffers that no adapter owns, those that are not yet known to the tracker."""
    total = 0
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if ".lora_" not in name:
            total += sum(tracker.hold(part) for part in _parts(tensor))
    return total


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None  # type: ignore[operator]
    if names is None:
        yield tensor
    else:
        for name in names:
            yield from _parts(getattr(tensor, name))


def watch(denoiser: Denoiser, tracker: Tracker, calls: dict[str, int]) -> None:
    """Give every call of the network its phase: whose adapter is on, and whether there is a graph."""
    call = denoiser.call

    def counted(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        who, graph = denoiser.adapters.current or "teacher", torch.is_grad_enabled()
        name = f"{who} forward" if graph else f"{who} pass"
        calls[name] = calls.get(name, 0) + 1
        tracker.enter(name)
        out = call(x, sigma, cond)
        # What follows a call with a graph is, sooner or later, its backward pass.
        tracker.enter(f"{who} backward" if graph else "between")
        return out

    denoiser.call = counted  # type: ignore[method-assign]


def count(denoiser: Denoiser, trainer: Callable[[], Trainer], steps: int = 1) -> Counted:
    """Run steps of a trainer whose network has no weights. trainer: makes it, adapters and all, on `denoiser`."""
    tracker, calls = Tracker(), {}  # type: ignore[var-annotated]
    with as_on_the_card(), tracker:
        blocks = tuple(frozen_bytes(tracker, block) for _, block in checkpointing.blocks(denoiser.network))
        base = sum(blocks) + frozen_bytes(tracker, denoiser.network)
        made = trainer()
        watch(denoiser, tracker, calls)
        made.prepare()
        adapters = tracker.now - base
        for runner in made.runners.values():
            runner.move = _Kept(runner, made.settings.optimiser, tracker).move  # type: ignore[method-assign]
        state = tracker.now - base - adapters
        calls.clear()
        tracker.reset()
        for _ in range(steps):
            made.step()
        fixed = base + adapters + state
        peaks = {name: peak - fixed for name, peak in tracker.peaks.items()}
        return Counted(base, blocks, adapters, state, peaks, dict(tracker.flops), dict(calls))


def state_bytes(optimiser: str, weight: Tensor) -> int:
    """What an optimiser keeps of one weight in memory."""
    numbers = weight.numel()
    # bitsandbytes leaves small weights in 32 bits, and keeps a scale for each 256 numbers of the others.
    if optimiser == "adamw8bit" and numbers >= 4096:
        return 2 * (numbers + -(-numbers // 256) * 4)
    return 2 * numbers * weight.element_size()


class _Kept:
    """A player's optimiser that has its state and moves nothing: a fused step takes no memory of its own."""

    def __init__(self, runner: Runner, optimiser: str, tracker: Tracker):
        self.state = [
            torch.empty(state_bytes(optimiser, w), dtype=torch.uint8, device=w.device) for w in runner.weights.values()
        ]
        self._tracker = tracker

    def move(self, rate: float) -> None:
        self._tracker.enter(OPTIMISER)
