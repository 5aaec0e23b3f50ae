"""How often one of two makers of pictures beats the other, with an interval that holds for few pairs too.

Clopper & Pearson 1934 (Biometrika 26): the interval of a binomial share whose ends each have a tail of (1 - level) / 2;
it covers the truth at least as often as it says. Ties decide nothing and are left out of the share. Pairs count as
independent; several seeds of one prompt are less than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import beta, binomtest


@dataclass(frozen=True)
class Comparison:
    """Counts of pairs. `share` is of those that decide: wins / (wins + losses), one half where none does."""

    wins: int
    losses: int
    ties: int

    @property
    def share(self) -> float:
        """Of the decided pairs, how many were won."""
        decided = self.wins + self.losses
        return self.wins / decided if decided else 0.5

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Clopper-Pearson's for the share; (0, 1) where nothing is decided."""
        tail = (1 - level) / 2
        low = float(beta.ppf(tail, self.wins, self.losses + 1)) if self.wins else 0.0
        high = float(beta.ppf(1 - tail, self.wins + 1, self.losses)) if self.losses else 1.0
        return low, high

    @property
    def chance(self) -> float:
        """Probability of a share at least as far from one half if both were equally good (two-sided binomial test)."""
        decided = self.wins + self.losses
        return float(binomtest(self.wins, decided).pvalue) if decided else 1.0

    def __str__(self) -> str:
        low, high = self.interval()
        ties = f", {self.ties} ties" if self.ties else ""
        return (
            f"wins {self.wins} of {self.wins + self.losses} ({self.share:.1%}, 95 % interval {low:.1%} to {high:.1%})"
            f"{ties}; by chance alone p = {self.chance:.2g}"
        )


def compare(mine: Sequence[float], others: Sequence[float]) -> Comparison:
    """Scores of the same pairs, higher is better. ValueError for unequal numbers of them, or none."""
    if len(mine) != len(others) or not mine:
        raise ValueError(f"there are {len(mine)} scores against {len(others)}: a comparison needs pairs, at least one")
    wins = sum(a > b for a, b in zip(mine, others, strict=True))
    losses = sum(a < b for a, b in zip(mine, others, strict=True))
    return Comparison(wins, losses, len(mine) - wins - losses)
