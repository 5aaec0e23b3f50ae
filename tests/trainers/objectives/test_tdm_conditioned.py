"""TDM whose fake score is told the student's step: an adapter for each, against closed forms."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from retort.sampling.path import VE
from retort.trainers.adapters import LoraConfig
from retort.trainers.objectives.parts.contract import Batch, alpha_sigma
from retort.trainers.objectives.tdm import TDM, TDMConfig, between

_spec = importlib.util.spec_from_file_location("retort_test_tdm", Path(__file__).with_name("test_tdm.py"))
plain = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain)
PATTERNS, SHAPE, _slopes, _teacher = plain.PATTERNS, plain.SHAPE, plain._slopes, plain._teacher


@dataclass(frozen=True)
class OneStep:
    """A sample whose means are expectations, at one step of the student for the whole batch."""

    number: int
    steps: int = 4
    indices: tuple[int, ...] = (0,)

    def normal(self, name, shape):
        """See Draws."""
        return torch.tensor(PATTERNS[name]).view(1, *shape)

    def uniform(self, name):
        """See Draws."""
        return torch.tensor([0.5])

    def common(self, name):
        """See Draws."""
        return {"pick": (self.number + 0.5) / self.steps, "steps": 0.0}[name]


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "demo"])
def test_a_conditioned_fake_score_learns_its_own_step_alone(affine, path, exact):
    """With `top` several steps reach one level, where a single fake score would learn their mixture."""
    std = 0.7
    config = TDMConfig(diffusing="top", conditioned=True, exact_score=exact, cfg=1.0, normalise=False, huber=0.0)
    sigmas = TDM(config, affine(path)).grids[4]
    found = [
        TDM(config, affine(path)).levels(Batch(OneStep(i), SHAPE, None), sigmas, torch.tensor([i])) for i in range(4)
    ]
    denoiser = affine(path, torch.cat([sigmas[:-1], *(tau for _, tau in found)]).tolist(), std=std)
    objective = TDM(config, denoiser)
    fakes = [f"fake_4_{i}" for i in range(4)]
    assert list(objective.players) == ["student", *fakes]
    for seed, name in enumerate(fakes):
        denoiser.adapters.add(name, LoraConfig(rank=1), seed)
        denoiser.set_affine(name, 0.5, 0.0)  # far from anything, so that taking a wrong one shows
    denoiser.set_affine("student", 0.0, 0.0)  # the teacher, with a slope
    variance = 1.0
    for i, (mid, tau) in enumerate(found):
        (a_g, s_g), (a_m, s_m), (a_t, s_t) = (
            [float(v) for v in alpha_sigma(path, s)] for s in (sigmas[i : i + 1], mid, tau)
        )
        ratio, beta = (float(v) for v in between(path, mid, tau))
        A = a_g * std**2 / (a_g**2 * std**2 + s_g**2)
        M = a_m * A + s_m * (1 - a_g * A) / s_g
        spread = ratio**2 * M**2 * variance + beta**2
        gain = (1 - s_t**2 / spread) / a_t if exact else ratio * M * A * variance / spread
        teacher = float(_teacher(path, tau, std))
        slopes = {}
        for beside in (0.0, 0.05):
            denoiser.set_affine(fakes[i], gain - teacher + beside, 0.0)
            found_slopes, _ = _slopes(objective, Batch(OneStep(i), SHAPE, None))
            assert set(found_slopes) == {"student", fakes[i]}
            slopes[beside] = found_slopes
        assert slopes[0.05][fakes[i]][4 + i] > 0
        assert abs(slopes[0.0][fakes[i]][4 + i]) < 1e-2 * slopes[0.05][fakes[i]][4 + i] + 1e-7
        expected = 2 * (gain - teacher) * ratio * M * variance
        assert slopes[0.0]["student"][i].item() == pytest.approx(expected, rel=1e-3, abs=1e-5)
        denoiser.set_affine(fakes[i], 0.5, 0.0)
        variance *= M**2


def test_conditioned_numbers_of_steps_have_fake_scores_of_their_own(affine):
    config = TDMConfig(steps=2, steps_choices="1, 2", conditioned=True)
    assert list(TDM(config, affine(VE)).players) == ["student", "fake_1_0", "fake_2_0", "fake_2_1"]
    with pytest.raises(ValueError, match="conditioned makes an adapter for each of 20 steps, and 16 are the most"):
        TDMConfig(steps=20, conditioned=True)
