"""A reward that cannot teach is named before a step is lost."""

from __future__ import annotations

import pytest
import torch

from retort.rewards.combine import Combined, Term
from retort.rewards.contract import require_differences
from retort.rewards.simple import Sharpness
from retort.trainers.objectives.align_prop import AlignProp
from retort.trainers.objectives.di_star import DIStar
from retort.trainers.objectives.flow_grpo import FlowGRPO
from retort.trainers.objectives.parts.contract import slope_of
from retort.trainers.objectives.spo import SPO

NO_GRADIENT = "the reward has no gradient with respect to the picture"


@pytest.mark.parametrize("kind", [SPO, FlowGRPO])
def test_equal_scores_of_the_whole_first_step(kind):
    made = kind.__new__(kind)
    with pytest.raises(ValueError, match=rf"the same score, 0\.25, so {kind.name} has nothing to learn from"):
        made.check_first({"reward": 0.25, "reward_spread": 0.0})
    made.check_first({"reward": 0.25, "reward_spread": 1e-6})
    made.check_first({"student_loss": 0.0})


@pytest.mark.parametrize("kind", [AlignProp, DIStar])
def test_no_slope_in_the_whole_first_step(kind):
    made = kind.__new__(kind)
    with pytest.raises(ValueError, match=NO_GRADIENT):
        made.check_first({"reward": 0.25, "reward_slope": 0.0})
    made.check_first({"reward": 0.25, "reward_slope": 1e-9})


def test_the_slope_of_scores_that_do_not_depend_on_the_picture():
    leaf = torch.rand(2, 4, 4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    apart = torch.ones(2, requires_grad=True)
    for rewards in (torch.zeros(2), apart * 2):
        with pytest.raises(ValueError, match=NO_GRADIENT):
            slope_of(rewards, leaf, "AlignProp")
    assert torch.equal(slope_of(3 * leaf.flatten(1).sum(1), leaf, "AlignProp"), torch.full_like(leaf, 3.0))
    vetoed = Combined((Term(Sharpness(), veto=1e9),))
    assert not slope_of(vetoed(leaf, "a"), leaf, "AlignProp").any()


def test_a_combination_without_weights_is_known_beforehand():
    with pytest.raises(ValueError, match="gives every picture the same score, 0, so nothing can be learnt or found"):
        require_differences(Combined((Term(Sharpness(), weight=0.0), Term(Sharpness(), weight=0.0))))
    for terms in ((Term(Sharpness(), weight=0.5),), (Term(Sharpness(), weight=0.0, veto=0.1),)):
        require_differences(Combined(terms))
