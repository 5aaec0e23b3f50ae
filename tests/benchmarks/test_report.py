"""A target is met by the value alone; the interval says whether the difference is more than noise."""

from __future__ import annotations

import pytest

from retort.benchmarks.report import Figure, Report


@pytest.mark.parametrize(
    ("better", "value", "interval", "met", "verdict"),
    [
        ("lower", 1.1, (1.0, 1.2), False, "no, within noise"),
        ("lower", 1.1, (1.06, 1.2), False, "no"),
        ("lower", 1.0, (0.9, 1.1), True, "yes, within noise"),
        ("lower", 1.0, (0.9, 1.05), True, "yes"),
        ("lower", 1.05, None, True, "yes"),
        ("higher", 1.0, (0.9, 1.1), False, "no, within noise"),
        ("higher", 1.0, (0.9, 1.04), False, "no"),
        ("higher", 1.1, (1.0, 1.2), True, "yes, within noise"),
        ("higher", 1.1, (1.05, 1.2), True, "yes"),
        ("higher", 1.0, None, False, "no"),
    ],
)
def test_the_value_itself_meets_a_target(better, value, interval, met, verdict):
    figure = Figure(value, target=1.05, better=better, interval=interval)
    assert (figure.met, figure.verdict) == (met, verdict)
    rows = Report("any", {"name": figure}).rows().splitlines()
    between = f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""
    assert [cell.strip() for cell in rows[-1].split("|")[3:-1:2]] == [between, verdict]


def test_no_target_has_no_verdict():
    figure = Figure(1.0, interval=(0.5, 2.0))
    assert figure.met is None and figure.verdict == ""
