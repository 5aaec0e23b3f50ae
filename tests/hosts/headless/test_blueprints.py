"""The blueprints in subgraphs/: whole, of known nodes, and what they hold runs on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from retort.graphs.graph import Node

ROOT = Path(__file__).resolve().parents[3]
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
INPUT, OUTPUT = -10, -20  # how the editor numbers what a subgraph takes and gives
PROMPT = {"text": "a green four on white paper", "width": 64, "height": 64}
# What a user would connect and type to run it on the embedded model in a moment.
GIVEN: dict[str, dict[str, Any]] = {
    "Text to Image (Distilled Model)": {"model": (3, 0), "preset": "digits_flow", "steps": 1, "noise_seed": 3},
    "Text to Image (Best of a Tree Search)": {
        "reward": (2, 0), "negative": "", "cfg": 3.0, "steps": 3, "calls": 12, "batch_size": 4, "seed": 3,
    },
    "Text to Image (Reflection, W2SD)": {"negative": "", "cfg": 2.0, "end": 1.0, "steps": 3, "noise_seed": 3},
}  # fmt: skip


@pytest.fixture(params=BLUEPRINTS, ids=lambda path: path.stem)
def blueprint(request):
    return request.param.stem, json.loads(request.param.read_text(encoding="utf-8"))


def test_there_are_three():
    assert {path.stem for path in BLUEPRINTS} == set(GIVEN)


def test_the_root_is_the_one_subgraph(blueprint):
    name, document = blueprint
    (root,), (graph,) = document["nodes"], document["definitions"]["subgraphs"]
    assert root["type"] == graph["id"] and root["title"] == graph["name"] == name
    assert document["links"] == []
    assert [(i["name"], i["type"]) for i in root["inputs"]] == [(i["name"], i["type"]) for i in graph["inputs"]]
    assert [(o["name"], o["type"]) for o in root["outputs"]] == [(o["name"], o["type"]) for o in graph["outputs"]]
    assert graph["category"].startswith("Image generation and editing/")
    assert len(document["extra"]["BlueprintDescription"]) > 40 and document["extra"]["BlueprintSearchAliases"]


def test_every_link_ends_where_it_says(blueprint, known):
    _, document = blueprint
    graph, registry = document["definitions"]["subgraphs"][0], known()
    nodes = {raw["id"]: raw for raw in graph["nodes"]}
    schemas = {id: registry.schema(Node(str(id), raw["type"], raw["type"])) for id, raw in nodes.items()}
    links = {link["id"]: link for link in graph["links"]}
    for id, link in links.items():
        origin, target = link["origin_id"], link["target_id"]
        if origin == INPUT:
            assert id in graph["inputs"][link["origin_slot"]]["linkIds"]
        else:
            assert schemas[origin].outputs[link["origin_slot"]].get_io_type() == link["type"]
            assert id in nodes[origin]["outputs"][link["origin_slot"]]["links"]
        if target == OUTPUT:
            assert id in graph["outputs"][link["target_slot"]]["linkIds"]
        else:
            assert nodes[target]["inputs"][link["target_slot"]]["link"] == id
    used = [one["link"] for raw in nodes.values() for one in raw["inputs"] if one["link"] is not None]
    assert sorted([*used, *(id for out in graph["outputs"] for id in out["linkIds"])]) == sorted(links)


def test_dropped_into_a_workflow_it_runs_on_the_embedded_model(blueprint, go, ui_node):
    name, document = blueprint
    root = document["nodes"][0]
    given = {"model": (1, 0), "clip": (1, 1), "vae": (1, 2), **PROMPT, **GIVEN[name]}
    assert set(given) == {one["name"] for one in root["inputs"]}, "each input is given a value"
    document["nodes"] = [
        ui_node(1, "RetortEmbeddedModel", [], ["MODEL", "CLIP", "VAE"], ["flow"]),
        ui_node(2, "RetortReward", [], ["REWARD"], ["colourfulness"]),
        ui_node(
            3, "LoraLoaderModelOnly", [("model", "MODEL", 90)], ["MODEL"], ["digits_flow_dmd2_1step.safetensors", 1.0]
        ),
        {**root, "id": 4, "widgets_values": [given[one["name"]] for one in root["inputs"] if "widget" in one]},
        ui_node(5, "SaveImage", [("images", "IMAGE", 91)], ["IMAGE"], ["drawn"]),
    ]
    document["links"] = [[90, 1, 0, 3, 0, "MODEL"], [91, 4, 0, 5, 0, "IMAGE"]]
    for slot, one in enumerate(root["inputs"]):
        if "widget" not in one:
            one["link"] = slot + 1
            document["links"].append([slot + 1, *given[one["name"]], 4, slot, one["type"]])
    outcome = go(document)
    assert not outcome.notes
    assert len([path for path in outcome.saved if path.name.startswith("drawn")]) == 1
