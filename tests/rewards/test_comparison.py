"""Win rates: counts, the exact interval by its definition and against published values."""

from __future__ import annotations

import pytest
from scipy.stats import binom

from retort.rewards.comparison import Comparison, compare


def test_pairs_are_counted():
    assert compare([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 5.0, 1.0]) == Comparison(2, 1, 1)
    assert Comparison(2, 1, 1).share == pytest.approx(2 / 3)
    assert (Comparison(0, 0, 3).share, Comparison(0, 0, 3).interval(), Comparison(0, 0, 3).chance) == (0.5, (0, 1), 1)
    with pytest.raises(ValueError, match="3 scores against 2"):
        compare([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least one"):
        compare([], [])


@pytest.mark.parametrize(("wins", "losses"), [(1, 9), (7, 3), (27, 5), (90, 10)])
def test_each_end_has_its_tail(wins, losses):
    n = wins + losses
    low, high = Comparison(wins, losses, 4).interval()
    assert binom.sf(wins - 1, n, low) == pytest.approx(0.025, abs=1e-9)
    assert binom.cdf(wins, n, high) == pytest.approx(0.025, abs=1e-9)


def test_closed_forms():
    # All of n won: the lower end is (tail)^(1/n); and by chance alone 2 / 2^n.
    low, high = Comparison(10, 0, 0).interval()
    assert (low, high) == (pytest.approx(0.025**0.1), 1.0)
    assert Comparison(10, 0, 0).chance == pytest.approx(2 / 2**10)
    assert Comparison(0, 10, 0).interval() == (0.0, pytest.approx(1 - 0.025**0.1))
    assert Comparison(5, 5, 0).chance == 1
    assert str(Comparison(10, 0, 2)) == (
        "wins 10 of 10 (100.0%, 95 % interval 69.2% to 100.0%), 2 ties; by chance alone p = 0.002"
    )
