"""A training step without numbers: what it takes in memory, place by place, and how much arithmetic, before a weight is
loaded.

Everything that counts is the real thing: the network's own modules, adapters, checkpoints, the method's passes,
clipping and what the optimiser keeps. Only the weights are missing (`weightless`). Deep networks are told by shallow
ones (`depths`), so that it takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import checkpointing, depths
from .counted import AT, BETWEEN, OPTIMISER, Counted
from .denoiser import Denoiser
from .loop import Trainer
from .memory import parts
from .optimisers import Optimiser, state_bytes
from .players import Runner
from .tracker import Tracker, block_bytes
from .weightless import as_on_the_card, weightless_copy


class Outline(Protocol):
    """A model as a host can describe it before its weights are loaded.

    network: its modules without weights. denoiser: a trainable one on such a network, or on a shallower copy.
    """

    network: nn.Module

    def denoiser(self, network: nn.Module) -> Denoiser:
        """See the class."""
        ...


# Makes the run's trainer, adapters and all, on a denoiser.
MakeTrainer = Callable[[Denoiser], Trainer]


def count(outline: Outline, trainer: MakeTrainer, steps: int = 1, optimiser: Optimiser | None = None) -> Counted:
    """What steps of a run take, from shallow copies of the network where it is deep.

    optimiser: whose state is counted, None for the trainer's own.
    """
    found = depths.kinds(outline.network)
    if not found:
        return run(outline, trainer, steps=steps, optimiser=optimiser)
    shallow: list[Counted] = []

    def numbers(kept: Sequence[int]) -> dict[str, float]:
        counted = run(outline, trainer, found, kept, steps, optimiser)
        shallow.append(counted)
        out: dict[str, float] = {"adapters": counted.adapters, "state": counted.state}
        out |= {f"peak {place}": peak for place, peak in counted.peaks.items()}
        out |= {f"move {name}": each for name, each in counted.moves.items()}
        return out | {f"flops {phase}": each for phase, each in counted.flops.items()}

    try:
        real = depths.extrapolated(numbers, [kind.count for kind in found])
    except (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError):
        # A network whose code counts its blocks, or names one, does not run without some of them.
        return run(outline, trainer, steps=steps, optimiser=optimiser)

    def told(word: str) -> dict[str, int]:
        return {k.removeprefix(f"{word} "): round(v) for k, v in real.items() if k.startswith(f"{word} ")}

    base, blocks = weights(outline.network)
    return Counted(
        base, blocks, round(real["adapters"]), round(real["state"]), told("peak"), told("flops"), shallow[0].calls,
        told("move"),
    )  # fmt: skip


def weights(network: nn.Module) -> tuple[int, tuple[int, ...]]:
    """(bytes of a network's frozen weights and buffers, those of each of its blocks)."""
    known: set[int] = set()
    blocks = tuple(_bytes(module, known) for _, module in checkpointing.units(network))
    return sum(blocks) + _bytes(network, known), blocks


def _bytes(module: nn.Module, known: set[int]) -> int:
    total = 0
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        for part in () if ".lora_" in name else parts(tensor):
            storage = part.untyped_storage()
            if storage._cdata not in known:
                known.add(storage._cdata)
                total += block_bytes(storage.nbytes())
    return total


def run(
    outline: Outline,
    trainer: MakeTrainer,
    kinds: Sequence[depths.Kind] = (),
    kept: Sequence[int] = (),
    steps: int = 1,
    optimiser: Optimiser | None = None,
) -> Counted:
    """Run steps of a run on the network, of each kind of block so many in a row. RuntimeError where one is not run."""
    network = weightless_copy(outline.network, without=depths.left_out(outline.network, kinds, kept))
    with as_on_the_card():
        return measure(outline.denoiser(network), trainer, Tracker(), depths.roles(kinds, kept), steps, optimiser)


def measure(
    denoiser: Denoiser,
    trainer: MakeTrainer,
    tracker: Tracker,
    roles: Mapping[str, str] | None = None,
    steps: int = 1,
    optimiser: Optimiser | None = None,
) -> Counted:
    """Run steps of a run on a denoiser, which is of no use afterwards. roles: see `depths.roles`."""
    network, watch = denoiser.network, _Watch(denoiser, roles or {})
    with tracker:
        base, blocks = weights(network)
        for tensor in [*network.parameters(), *network.buffers()]:
            for part in parts(tensor):
                tracker.hold(part)
        with torch.device(denoiser.device):
            made = trainer(denoiser)
        watch.begin(tracker)
        made.prepare()
        adapters = tracker.now - base
        alive: dict[str, int] = {}
        kept = {
            name: _Kept(runner, optimiser or made.settings.optimiser, tracker, alive)
            for name, runner in made.runners.items()
        }
        for name, each in kept.items():
            made.runners[name].move = each.move  # type: ignore[method-assign]
        state = tracker.now - base - adapters
        watch.calls.clear()
        tracker.reset()
        for _ in range(steps):
            made.step()
        watch.check()
        fixed = base + adapters + state
        peaks = {name: peak - fixed for name, peak in tracker.peaks.items()}
        moves, later = {}, sum(each.bytes for each in kept.values())
        for name, bytes in alive.items():
            later -= kept[name].bytes
            # The states of those that move after it are not there yet.
            moves[name] = bytes - base - adapters - later
        flops: dict[str, int] = {}
        for place, operations in tracker.flops.items():
            phase = place.partition(AT)[0]
            flops[phase] = flops.get(phase, 0) + operations
        return Counted(base, blocks, adapters, state, peaks, flops, dict(watch.calls), moves)


class _Watch:
    """Tells a tracker where a step is: whose adapter computes, with a graph or not, forwards or back, and the block."""

    def __init__(self, denoiser: Denoiser, roles: Mapping[str, str]):
        self._denoiser, self._roles = denoiser, roles
        self.calls: dict[str, int] = {}
        self._entered: dict[str, bool] = {}
        self._phase = BETWEEN

    def begin(self, tracker: Tracker) -> None:
        """From now on; before the blocks are checkpointed."""
        for name, module in checkpointing.units(self._denoiser.network):
            self._entered[name] = False
            checkpointing.precede(module, self._entering(tracker, name))
        call = self._denoiser.call

        def counted(x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
            who, graph = self._denoiser.adapters.current or "teacher", torch.is_grad_enabled()
            self._phase = f"{who} forward" if graph else f"{who} pass"
            self.calls[self._phase] = self.calls.get(self._phase, 0) + 1
            tracker.enter(self._phase)
            try:  # a call for features is left by an exception
                return call(x, sigma, cond)
            finally:
                # What follows a call with a graph is, sooner or later, its backward pass.
                self._phase = f"{who} backward" if graph else BETWEEN
                tracker.enter(self._phase)

        self._denoiser.call = counted  # type: ignore[method-assign]

    def _entering(self, tracker: Tracker, name: str) -> Callable[[], None]:
        # A unit may lie within a block that is repeated.
        owner = next((block for block in self._roles if f"{name}.".startswith(f"{block}.")), None)
        place = name if owner is None else self._roles[owner] + name.removeprefix(owner)

        def entered() -> None:
            self._entered[name] = True
            tracker.enter(f"{self._phase}{AT}{place}")

        return entered

    def check(self) -> None:
        """RuntimeError for a block that never ran."""
        idle = [name for name, entered in self._entered.items() if not entered]
        if idle and self._roles:
            raise RuntimeError(f"{idle[0]} did not run")


class _Kept:
    """A player's optimiser that has its state and moves nothing: a fused step takes no memory of its own.

    alive: takes the bytes that are there when a player moves for the first time.
    """

    def __init__(self, runner: Runner, optimiser: Optimiser, tracker: Tracker, alive: dict[str, int]):
        self._runner, self._optimiser, self._tracker, self._alive = runner, optimiser, tracker, alive
        self._state = [] if runner.in_host else self._made()
        self.bytes = sum(block_bytes(tensor.nbytes) for tensor in self._state)  # that are here all the time

    def _made(self) -> list[Tensor]:
        weights = self._runner.weights.values()
        return [torch.empty(state_bytes(self._optimiser, w), dtype=torch.uint8, device=w.device) for w in weights]

    def move(self, rate: float, begins: Callable[[], None] = lambda: None) -> None:
        """With what is in host memory between two steps brought here."""
        self._tracker.enter(OPTIMISER)
        with self._runner.turn():
            state = self._state or self._made()
            begins()
            self._alive.setdefault(self._runner.name, self._tracker.now)
            self._runner.forget_gradients()
            del state
