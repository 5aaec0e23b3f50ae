"""One declaration of a setting is all there is: nodes offer what configs take, pages and job files say the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import pytest

from retort.hosts.api import io
from retort.hosts.restoration.run import Size
from retort.nodes import NODES, help_pages, search
from retort.nodes.inputs import CHOICE, completed, inputs_of
from retort.restoration.degradation import Infrared, RealWorld
from retort.restoration.one_step import OneStep
from retort.restoration.spectral import SpectralConfig
from retort.restoration.spoil import Spoiling
from retort.restoration.tiles import Tiling
from retort.sampling.find import FindConfig
from retort.sampling.reflection import ReflectionConfig
from retort.sampling.settings import Settings, changed, declared, offered, setting
from retort.trainers.adapters import LoraConfig
from retort.trainers.config import TrainingConfig
from retort.trainers.methods import METHODS, read_config

# What a setting's lowest or highest value, or one of its options, goes with.
WITH = {
    ("accumulation", 4096): {"accumulation_cap": 4096},
    ("noise_scale_target", 100): {"accumulation": 2},
    ("optimiser", "prodigy"): {"learning_rate": 1.0},
    ("high", 0.01): {"low": 0.0, "narrow": 0.01},
    ("low", 0.99): {"high": 1.0, "narrow": 1.0},
    ("narrow", 0.01): {"low": 0.0},
    ("narrow", 1.0): {"high": 1.0},
    ("cfg", 1.0): {"decoupled": False},
    ("sid_alpha", -10.0): {"distance": "l2"},
    ("sid_alpha", 10.0): {"distance": "l2"},
    ("last", 1000): {"steps": 1000},
    ("trained", 999): {"steps": 1000},
    ("trained", 1000): {"steps": 1000},
    ("weakest", 1.0): {"strongest": 1.0},
    ("strongest", 0.0): {"weakest": 0.0},
    ("least", 64.0): {"most": 64.0},
    ("most", 1.0): {"least": 1.0},
    ("matching_weight", 0.0): {"gan_weight": 0.0},
    ("gan_weight", 100.0): {"matching_weight": 1.0},
    ("tile", 0): {"overlap": 64},
    ("overlap", 4096): {"tile": 8192},
}  # fmt: skip
CONFIGS = {
    "training": TrainingConfig, "lora": LoraConfig, **{name: each.config for name, each in METHODS.items()},
    "find": FindConfig, "reflection": ReflectionConfig, "real_world": RealWorld, "infrared": Infrared,
    "tiling": Tiling, "size": Size, "one_step": OneStep, "spectral": SpectralConfig, "spoiling": Spoiling,
}  # fmt: skip
TRAINERS = [node for node in NODES if {"offload", "rank"} <= {one.id for one in node.GET_SCHEMA().inputs}]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_node_offers_no_value_that_is_refused(name):
    config = CONFIGS[name]
    inputs = inputs_of(config)
    assert config(**{one.id: one.default for one in inputs}) == config()
    for one in inputs:
        ends = getattr(one, "options", None) or [getattr(one, end, None) for end in ("min", "max")]
        for value in (each for each in ends if each is not None):
            # An integer's range has whole ends, or a value within it would be refused.
            value = type(one.default)(value)
            others = {k: v for k, v in WITH.get((one.id, value), {}).items() if k in declared(config)}
            if (one.id, value) == ("steps", value) and name in ("dmd2", "f_distill", "di_star", "tdm"):
                others["timesteps"] = ""
            if one.id == "steps" and "last" in declared(config):
                others["last"] = 1
            if one.id == "steps" and "trained" in declared(config):
                others["trained"] = 1
            assert getattr(config(**{one.id: value, **others}), one.id) == value


def test_searches_offer_no_value_that_is_refused():
    methods = {name: (search.config_of, inputs()) for name, inputs in search.METHODS.items()}
    for name, (made, inputs) in methods.items():
        new = {"method": name, **{one.id: one.default for one in inputs}}
        made(new)
        for one in inputs:
            for value in getattr(one, "options", None) or [getattr(one, end, None) for end in ("min", "max")]:
                if value is not None:
                    made({**new, one.id: type(one.default)(value)})


@pytest.mark.parametrize("name", CONFIGS)
def test_what_no_input_offers_is_refused_with_field_value_and_remedy(name):
    for one in declared(CONFIGS[name]).values():
        if one.low is not None:
            beyond = [math.nextafter(one.low, -math.inf), math.nextafter(one.high, math.inf), math.nan]
            for value in [one.low - 1, one.high + 1] if one.kind is int else beyond:
                with pytest.raises(ValueError, match=rf"{one.name} must be between .*, got .*{one.remedy and ': '}"):
                    one.check(value)
        if one.choices:
            with pytest.raises(ValueError, match=f"{one.name} must be one of .*, got 'another'"):
                CONFIGS[name](**{one.name: "another"})


@pytest.mark.parametrize("name", CONFIGS)
def test_every_setting_is_explained_and_every_range_of_a_number_given(name):
    for one in offered(CONFIGS[name]):
        assert one.help.endswith("."), one.name
        assert not one.page or one.page.endswith("."), one.name
        assert one.kind not in (int, float) or (one.low is not None and one.high is not None), one.name


@pytest.mark.parametrize("node", TRAINERS, ids=lambda node: node.__name__)
def test_a_job_that_says_nothing_trains_as_its_node_does(node):
    """Steps and rank are each node's own, and what Training Job begins with is what a job file means."""
    common = {one.id: getattr(one, "default", None) for one in node.GET_SCHEMA().inputs}
    own = {"steps"} if node.__name__ != "RetortTrainingJob" else set()
    for one in declared(TrainingConfig).values():
        if one.name in common and one.name not in own:
            assert common[one.name] == one.default, one.name
    for name in METHODS:
        assert read_config({"method": name}).objective == METHODS[name].config()


def test_values_that_a_prompt_left_out_are_those_of_a_new_node():
    node = next(node for node in NODES if node.__name__ == "RetortTrainDistillation")
    # As ComfyUI hands over what an option's inputs were left at.
    found = completed(node, {"method": {"method": "tdm", "steps": 2, "cfg": None}, "name": "mine"})
    new = {one.id: one.default for one in inputs_of(METHODS["tdm"].config)}
    assert found["method"] == {"method": "tdm", **new, "steps": 2}
    assert found["name"] == "mine" and found["rank"] == 64 and found["steps"] == 500 and "clip" not in found
    for value in (None, {}, {"method": "tmd"}):
        with pytest.raises(ValueError, match="method .*: choose one of dmd2, f_distill, tdm, di_star"):
            completed(node, {"method": value})


@dataclass(frozen=True)
class Base(Settings):
    """Of the tests below."""

    strength: float = setting(1.0, 0, 2, step=0.1, help="How strong.", page="More of it.", remedy="1 is usual")
    kind: Literal["soft", "hard"] = setting("soft", advanced=True, help="Which kind.")
    hidden: int = setting(3, 0, 9)


@dataclass(frozen=True)
class Derived(Base):
    """Another default, another order, and a rule of its own."""

    shown = ("kind", "strength", "on")

    strength: float = changed(Base, "strength", default=0.5, help="How strong here.")
    on: bool = setting(False, help="Whether.")

    def check(self):
        """See the base."""
        if self.on and not self.strength:
            raise ValueError("on needs strength: raise it")


def test_a_declaration_becomes_a_check():
    assert Derived(kind="hard", strength=2.0).hidden == 3
    for given, message in (
        ({"strength": 2.5}, r"strength must be between 0 and 2, got 2\.5: 1 is usual"),
        ({"kind": "loud"}, "kind must be one of soft, hard, got 'loud'"),
        ({"hidden": 10}, "hidden must be between 0 and 9, got 10$"),
        ({"on": True, "strength": 0.0}, "on needs strength"),
    ):
        with pytest.raises(ValueError, match=message):
            Derived(**given)


def test_a_declaration_becomes_inputs_in_the_order_that_nodes_show():
    kind, strength, on = inputs_of(Derived, on=True, strength={"display_name": "force"})
    assert [type(one) for one in (kind, strength, on)] == [io.Combo.Input, io.Float.Input, io.Boolean.Input]
    assert kind.options == ["soft", "hard"] and kind.advanced and kind.default == "soft"
    assert (strength.min, strength.max, strength.step, strength.default) == (0.0, 2.0, 0.1, 0.5)
    assert strength.display_name == "force" and strength.tooltip == "How strong here." and on.default is True


def test_a_declaration_becomes_a_line_of_a_page():
    found = help_pages.listed(inputs_of(Derived), dict(declared(Derived)))
    assert "- **strength** (0.5; 0 to 2): How strong here." in found
    assert "- **kind** (soft; or hard): Which kind." in found and "hidden" not in found
    assert "- **on** (off): Whether." in found
    assert "More of it." in help_pages.listed(inputs_of(Base), dict(declared(Base)))


@pytest.mark.parametrize("path", help_pages.pages(), ids=lambda path: f"{path.parent.parent.name}/{path.stem}")
def test_pages_are_as_declared(path):
    text = path.read_text(encoding="utf-8")
    assert help_pages.written(text, path.stem) == text, "run `python -m retort.nodes.help_pages`"


def test_a_page_names_what_there_is():
    with pytest.raises(ValueError, match="settings nothing on the page of RetortTrainFlow: it must be run"):
        help_pages.written("<!-- settings nothing -->\n<!-- end -->", "RetortTrainFlow")


def test_every_choice_of_a_method_is_one_of_the_registered():
    for node in TRAINERS:
        for one in node.GET_SCHEMA().inputs:
            if one.get_io_type() == CHOICE:
                assert [option.key for option in one.options] == [
                    name for name in METHODS if name in {option.key for option in one.options}
                ]
