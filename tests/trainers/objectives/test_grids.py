"""The students' grids and the levels of the papers."""

from __future__ import annotations

import pytest
import torch

from retort.sampling.path import FLOW, VE, VP
from retort.trainers.objectives.dmd2 import DMD2Config
from retort.trainers.objectives.parts.grids import student_sigmas


@pytest.mark.parametrize("path", [VE, VP], ids=["VE", "VP"])
def test_the_grids_of_eps_and_v(exact, path):
    denoiser = exact(path)
    table = denoiser.schedule.sigmas
    for steps, entries in ((1, [399]), (2, [999, 499]), (4, [999, 749, 499, 249])):
        assert student_sigmas(denoiser, steps).tolist() == [*table[entries].tolist(), 0.0]
    assert student_sigmas(denoiser, 2, "999, 399").tolist() == [*table[[999, 399]].tolist(), 0.0]
    assert float(student_sigmas(denoiser, 1)[0]) == pytest.approx(1.16058, abs=1e-5)


def test_the_grids_of_flows(exact):
    denoiser = exact(FLOW)
    assert student_sigmas(denoiser, 1).tolist() == [1.0, 0.0]
    assert student_sigmas(denoiser, 4).tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert student_sigmas(denoiser, 2, "1000, 750").tolist() == pytest.approx([1.0, 0.75, 0.0])
    denoiser.schedule = type(denoiser.schedule)(shift=3.0)
    assert student_sigmas(denoiser, 4).tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])


@pytest.mark.parametrize(
    ("steps", "timesteps", "word"),
    [(0, "", "steps"), (3, "999, 499", "set steps to 2"), (2, "499, 999", "timesteps"), (1, "many", "timesteps")],
)
def test_a_grid_that_cannot_be_is_refused(exact, steps, timesteps, word):
    with pytest.raises(ValueError, match=word):
        student_sigmas(exact(VE), steps, timesteps)
    with pytest.raises(ValueError, match=word):
        DMD2Config(steps=steps, timesteps=timesteps)


def test_levels_are_those_of_the_papers(exact):
    ends = torch.tensor([0.0, 1 - 2**-24])
    for path in (VE, VP):
        table = exact(path).schedule.sigmas
        assert torch.equal(exact(path).levels.drawn(ends, 0.02, 0.98), table[[20, 979]])
        assert torch.equal(exact(path).levels.drawn(ends), table[[0, 999]])
        assert torch.equal(exact(path).levels.drawn(ends, 0.29, 0.58), table[[290, 579]])
        for entry in (0, 20, 399, 999):
            level = float(table[entry])
            assert exact(path).levels.drawn(ends, 0.0, exact(path).levels.place(level))[1] == table[entry]
    flow = exact(FLOW)
    torch.testing.assert_close(flow.levels.drawn(ends, 0.02, 0.98), torch.tensor([0.02, 0.98]))
    assert float(flow.levels.drawn(ends)[0]) == pytest.approx(0.001)
    torch.testing.assert_close(flow.levels.drawn(torch.tensor([0.5]), shift=3.0), torch.tensor([0.75]))
    assert flow.levels.place(0.75, shift=3.0) == pytest.approx(0.5)
