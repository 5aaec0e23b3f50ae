"""Recipes of students in the metadata of their LoRAs: what is written can be read."""

from __future__ import annotations

import pytest

from retort.nodes.distilled import RetortDistilledSetup, RetortDistilledSigmas
from retort.nodes.load_student import RetortLoadStudent
from retort.sampling.students.preset import MOST_STEPS, Preset
from retort.trainers import recipes
from retort.trainers.objectives.tdm import TDMConfig


def test_whatever_number_of_steps_is_trained_can_be_read_again():
    """The trainers' bound is the reader's, in the number of steps, of lists, and in bytes."""
    grids = tuple(tuple(1 - i / (n + 1 / 3) for i in range(n)) for n in range(MOST_STEPS, 0, -1))
    recipe = recipes.Recipe(Preset("student", "x", "flow", levels=grids), "tdm", {})
    assert recipes.read({recipes.KEY: recipes.written(recipe)}) == recipe
    counts = ", ".join(map(str, range(1, MOST_STEPS + 1)))
    assert TDMConfig(steps=MOST_STEPS, steps_choices=counts).choices[-1] == MOST_STEPS
    for given in ({"steps": MOST_STEPS + 1}, {"steps": 4, "steps_choices": f"4, {MOST_STEPS + 1}"}):
        with pytest.raises(ValueError, match=f"1 (to|and) {MOST_STEPS}"):
            TDMConfig(**given)
    for node in (RetortDistilledSetup, RetortDistilledSigmas, RetortLoadStudent):
        assert next(one.max for one in node.GET_SCHEMA().inputs if one.id == "steps") == MOST_STEPS
