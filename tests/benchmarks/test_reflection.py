"""The benchmark of reflection: what its rows are, on a few prompts."""

from __future__ import annotations

import pytest
import torch

from retort.benchmarks import reflection
from retort.benchmarks.report import Figure
from retort.models import evaluate
from retort.sampling.grids import simple
from retort.sampling.schedule import FlowSchedule


@pytest.fixture(scope="module")
def models():
    return reflection.Models()


def counted(pair, way, models, monkeypatch):
    """(latents, network calls) of one way, guidance counted."""
    calls = 0
    side = models.side

    def counting(which, words, short):
        denoiser = side(which, words, short)

        def model(x, sigma):
            nonlocal calls
            calls += which.calls
            return denoiser(x, sigma)

        return model

    monkeypatch.setattr(models, "side", counting)
    noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    words, _ = evaluate.requests(2, 0)
    out = reflection.sampled(pair, way, models, words, ["a one", "a two"], noise)
    return out, calls


@pytest.mark.parametrize("name", list(reflection.PAIRS))
def test_equal_calls_are_equal(name, models, monkeypatch):
    pair = reflection.PAIRS[name]
    monkeypatch.setattr(reflection, "STEPS", 4)
    reflected, spent = counted(pair, "reflected", models, monkeypatch)
    monkeypatch.undo()
    monkeypatch.setattr(reflection, "STEPS", 4)
    plain, calls = counted(pair, "equal calls", models, monkeypatch)
    assert abs(calls - spent) <= pair.strong.calls
    assert calls == pair.strong.calls * reflection.equal_steps(pair, simple(FlowSchedule(3.0), 4))
    assert torch.isfinite(reflected).all() and not torch.allclose(reflected, plain, atol=1e-3)


def test_wins_count_ties_half():
    ours, theirs = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 2.0, 4.0, 3.0])
    figure = reflection.wins(ours, theirs, 0.5)
    assert isinstance(figure, Figure) and figure.value == 0.625 and figure.met
