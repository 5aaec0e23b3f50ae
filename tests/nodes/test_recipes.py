"""Recipes fill in what nodes offer, and their cost is that of the counted table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retort.benchmarks import memory_table
from retort.nodes import NODES
from retort.nodes.inputs import CHOICE
from retort.trainers.config import TrainingConfig
from retort.trainers.counted import Counted
from retort.trainers.methods import read_config
from retort.trainers.planning import on_cards

ROOT = Path(__file__).resolve().parents[2]
RECIPES = json.loads((ROOT / "extensions" / "comfyui" / "recipes.json").read_text(encoding="utf-8"))
KEPT = json.loads(memory_table.KEPT.read_text(encoding="utf-8"))
GB = 2**30


@pytest.fixture(params=RECIPES, ids=lambda recipe: recipe["title"])
def recipe(request):
    return request.param


def offered(recipe):
    """The inputs that the node has with the recipe's method, by the names of their widgets."""
    schema = next(node for node in NODES if node.__name__ == recipe["node"]).GET_SCHEMA()
    found = {}
    for one in schema.inputs:
        found[one.id] = one
        if one.get_io_type() == CHOICE:
            option = next(each for each in one.options if each.key == recipe["values"][one.id])
            found |= {f"{one.id}.{each.id}": each for each in option.inputs}
    return found


def test_a_recipe_fills_in_what_the_node_offers(recipe):
    """Every name is an input's, every value within its range and of its type; what costs is said."""
    inputs = offered(recipe)
    for name, value in recipe["values"].items():
        one = inputs[name]
        kind = one.get_io_type()
        if kind == CHOICE:
            continue
        if kind == "COMBO":
            assert value in one.options, name
        else:
            assert type(value) is {"INT": int, "FLOAT": float, "BOOLEAN": bool}[kind], name
            assert kind == "BOOLEAN" or one.min <= value <= one.max, name
    deciding = {"steps", "batch_size", "accumulation", "rank", "gradient_checkpointing", "optimiser"}
    assert deciding <= set(recipe["values"])


def test_a_recipes_settings_go_together(recipe):
    """As the node itself would read them."""
    values = recipe["values"]
    training = {name: value for name, value in values.items() if "." not in name and name in vars(TrainingConfig())}
    objective = {name.partition(".")[2]: value for name, value in values.items() if "." in name}
    method = values.get("method", "flow")
    lora = {"rank": values["rank"]}
    config = read_config({"method": method, "objective": objective, "training": training, "lora": lora})
    assert config.training.steps == values["steps"]


def test_what_a_recipe_costs_is_what_was_counted(recipe):
    """Peak and host memory on that card, and a step's arithmetic; none for the demo model, which runs anywhere."""
    if "counted" not in recipe:
        assert "Demo Model" in recipe["title"] and "gb" not in recipe
        return
    both = {name: Counted(**{**one, "blocks": tuple(one["blocks"])}) for name, one in KEPT[recipe["counted"]].items()}
    measures = {"alone": (memory_table.ALONE,), "lean": memory_table.LEAN}
    more = tuple((measures[name], both[name]) for name in measures if name in both)
    ((_, plan),) = on_cards(both["plain"], TrainingConfig(gradient_checkpointing=True), [recipe["card"]], more)
    assert plan.on_card and f"{recipe['card']} GB" in recipe["title"]
    assert recipe["gb"] == round(plan.peak / GB, 1) and recipe["host"] == round(plan.host / GB, 1)
    assert recipe["tflop"] == round(both["plain"].operations / 1e12)
    # It was counted with one sample at once, this rank and this optimiser.
    values = recipe["values"]
    assert values["batch_size"] == 1 and values["rank"] == 16 and values["gradient_checkpointing"]
    assert values["optimiser"] == ("adamw8bit" if "adamw8bit" in recipe["counted"] else "adamw")
    assert values.get("method", "flow") == recipe["counted"].split(", ")[1]


@pytest.mark.parametrize(
    ("title", "template"),
    [
        ("Z-Image, 12 GB, style", "Z-Image - Train a style on your pictures"),
        ("Retort Demo Model, 1 step", "2 Train a student that draws in 1 step"),
    ],
)
def test_a_recipe_is_what_the_template_of_the_same_training_has(title, template):
    """So that whoever opened one and chooses the other goes on with the same run."""
    recipe = next(one for one in RECIPES if one["title"] == title)
    nodes = json.loads((ROOT / "workflows" / f"{template}.json").read_text(encoding="utf-8"))["nodes"]
    node = next(one for one in nodes if one["type"] == recipe["node"])
    names = [one["name"] for one in node["inputs"] if "widget" in one]
    # The seed's "control after generate" is no input; trainers have none.
    stored = dict(zip(names, node["widgets_values"], strict=True))
    fresh = {name: one.default for name, one in offered(recipe).items() if getattr(one, "default", None) is not None}
    own = {"name", "prompts", "seed", "start_from", "method"}
    wanted = {name: recipe["values"].get(name, fresh.get(name)) for name in stored if name not in own}
    assert {name: stored[name] for name in wanted} == wanted
