"""What a dry run has counted of one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

OPTIMISER, BETWEEN = "optimiser", "between"
# Between a phase and the block in which something happens.
AT = " @ "


@dataclass(frozen=True)
class Counted:
    """Bytes and operations of one step.

    base: of the frozen weights; blocks: those of each block among them, in order. adapters: of the trained weights;
    state: of the optimisers. peaks: by place (a phase, " @ ", a block), what is alive beyond base, adapters and state.
    flops, calls (of the network): by phase. moves: by player, in their order, what is alive beyond base and adapters
    when it moves in a run's first step, in which each optimiser's state is made.
    """

    base: int
    blocks: tuple[int, ...]
    adapters: int
    state: int
    peaks: Mapping[str, int]
    flops: Mapping[str, int] = field(default_factory=dict)
    calls: Mapping[str, int] = field(default_factory=dict)
    moves: Mapping[str, int] = field(default_factory=dict)

    @property
    def beside(self) -> int:
        """The most that is alive beyond the base."""
        return self.adapters + self.state + max(self.peaks.values())

    @property
    def first(self) -> int:
        """The same in a run's first step."""
        before = (peak for place, peak in self.peaks.items() if place != OPTIMISER)
        return self.adapters + max(*before, *self.moves.values(), 0, 0)

    @property
    def operations(self) -> int:
        """Of the whole step."""
        return sum(self.flops.values())

    def phases(self) -> dict[str, int]:
        """The most that is alive beyond base, adapters and state, by phase."""
        found: dict[str, int] = {}
        for place, peak in self.peaks.items():
            phase = place.partition(AT)[0]
            found[phase] = max(found.get(phase, 0), peak)
        return found
