"""A run's settings: what they refuse, and which of them a continued run may change."""

from __future__ import annotations

from dataclasses import replace

import pytest

from retort.trainers.config import RunConfig, TrainingConfig, differences
from retort.trainers.objectives.dmd2 import DMD2Config


def test_a_students_steps_are_not_the_runs():
    """Both are called steps: a run may be made longer, its student's grid stays."""
    one = RunConfig("dmd2", DMD2Config(steps=1), TrainingConfig(steps=10))
    longer = replace(one, training=replace(one.training, steps=20))
    assert differences(one.to_json(), longer.to_json()) == []
    four = replace(one, objective=DMD2Config(steps=4))
    assert differences(one.to_json(), four.to_json()) == ["objective.steps: 1 -> 4"]


def test_settings_name_what_is_wrong():
    with pytest.raises(ValueError, match="batch_size must be between 1 and 4096, got 0"):
        TrainingConfig(batch_size=0)
    with pytest.raises(ValueError, match="learning_rate"):
        TrainingConfig(learning_rate=float("nan"))
    assert replace(TrainingConfig(), decay="cosine", warmup=0, steps=10).rate(5) == pytest.approx(0.5)
