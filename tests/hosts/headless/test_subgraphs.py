"""Subgraphs are unfolded as ComfyUI's editor queues them."""

from __future__ import annotations

import copy

import pytest
import torch

from retort.files.errors import NodeError, UsageError
from retort.graphs import workflow

SLOTS = [
    ("model", "MODEL"), ("positive", "CONDITIONING"), ("negative", "CONDITIONING"), ("latent_image", "LATENT"),
    ("seed", "INT"), ("steps", "INT"),
]  # fmt: skip


def link(id, origin, slot, target, target_slot, kind):
    return {
        "id": id, "origin_id": origin, "origin_slot": slot, "target_id": target, "target_slot": target_slot,
        "type": kind,
    }  # fmt: skip


def definition(id, inner, slots=SLOTS):
    """A subgraph around one node, whose inputs and first output are its own."""
    inputs = [{"name": name, "type": kind, "link": i + 1} for i, (name, kind) in enumerate(slots)]
    return {
        "id": id, "name": id, "nodes": [{**inner, "id": 1, "inputs": inputs}],
        "inputs": [{"name": name, "type": kind, "linkIds": [i + 1]} for i, (name, kind) in enumerate(slots)],
        "outputs": [{"name": "LATENT", "type": "LATENT", "linkIds": [20]}],
        "links": [
            *(link(i + 1, -10, i, 1, i, kind) for i, (_, kind) in enumerate(slots)), link(20, 1, 0, -20, 0, "LATENT"),
        ],
    }  # fmt: skip


@pytest.fixture
def read(known):
    return lambda document: workflow.from_document(copy.deepcopy(document), known())


@pytest.fixture
def nested(ui):
    """The workflow with its KSampler, node 5, inside a subgraph on which seed and steps can be typed."""
    sampler = ui["nodes"][4]
    ui["definitions"] = {"subgraphs": [definition("inside", copy.deepcopy(sampler))]}
    sampler["type"], sampler["widgets_values"] = "inside", [77, 99]
    sampler["inputs"].insert(4, {"name": "seed", "type": "INT", "widget": {"name": "seed"}, "link": None})
    sampler["inputs"][5]["widget"] = {"name": "steps"}
    ui["links"][9][4] = 5
    return ui


def test_it_is_the_same_graph(read, ui, nested):
    flat, deep = read(nested), nested
    assert set(flat.nodes) == {"1", "2", "3", "4", "5:1", "6", "7"}
    node = flat.nodes["5:1"]
    assert (node.class_type, node.title) == ("KSampler", "Draw")
    # From outside: the seed that was typed, and the steps of the primitive; from within: the rest.
    assert (node.inputs["seed"], node.inputs["steps"], node.inputs["cfg"]) == (77, 3, 4.0)
    assert flat.nodes["6"].inputs["samples"].node == "5:1"
    assert flat.document["definitions"] == deep["definitions"]


def test_it_gives_the_same_latent(go, api, nested):
    nested["nodes"][4]["widgets_values"] = [5, 99]
    first = go(api, keep={"5"}).results.outputs["5"][0][0]["samples"]
    assert torch.equal(go(nested, keep={"5:1"}).results.outputs["5:1"][0][0]["samples"], first)


def test_what_is_not_typed_outside_is_as_it_stands_within(read, nested):
    nested["nodes"][4]["widgets_values"] = []
    assert read(nested).nodes["5:1"].inputs["seed"] == 5


def promoted(nested, *entries, values):
    """The instance with a list of what is promoted on it, and no sockets for that."""
    instance = nested["nodes"][4]
    instance["inputs"] = [one for one in instance["inputs"] if "widget" not in one]
    instance["properties"], instance["widgets_values"] = {"proxyWidgets": [list(entry) for entry in entries]}, values
    for one in nested["definitions"]["subgraphs"][0]["nodes"][0]["inputs"][4:]:
        one["widget"] = {"name": one["name"]}
    return nested


def test_values_typed_outside_without_sockets(read, nested):
    """In the order of the list, whatever the order of the subgraph's inputs."""
    nested = promoted(nested, ("-1", "steps"), ("-1", "seed"), values=[9, 77])
    inputs = read(nested).nodes["5:1"].inputs
    assert (inputs["seed"], inputs["steps"]) == (77, 9)


def test_a_widget_of_a_node_within_is_typed_outside(read, nested):
    """By the node's id: one that an input of the subgraph leads to, and one that none does."""
    nested = promoted(nested, ("1", "cfg"), ("1", "seed"), ("1", "steps"), values=[2.5, 77, None])
    inputs = read(nested).nodes["5:1"].inputs
    assert (inputs["cfg"], inputs["seed"], inputs["steps"]) == (2.5, 77, 99)


def test_without_any_list_the_values_are_the_inputs_that_are_widgets(read, nested):
    nested = promoted(nested, values=[77, 9])
    del nested["nodes"][4]["properties"]
    inputs = read(nested).nodes["5:1"].inputs
    assert (inputs["seed"], inputs["steps"]) == (77, 9)


def test_a_value_within_is_typed_two_subgraphs_further_out(read, nested):
    inner = promoted(nested, ("1", "cfg"), values=[3.0])["nodes"][4]
    outer = definition("outside", inner, SLOTS[:4])
    outer["nodes"][0]["properties"] = inner["properties"]
    nested["definitions"]["subgraphs"].append(outer)
    nested["nodes"][4] = {
        **inner, "type": "outside", "properties": {"proxyWidgets": [["1", "cfg"]]}, "widgets_values": [1.5]
    }  # fmt: skip
    assert read(nested).nodes["5:1:1"].inputs["cfg"] == 1.5
    nested["nodes"][4]["widgets_values"] = []
    assert read(nested).nodes["5:1:1"].inputs["cfg"] == 3.0


def test_a_value_typed_outside_is_changed_where_it_is_stored(known, nested):
    graph = workflow.from_document(promoted(nested, ("1", "cfg"), values=[2.5]), known())
    graph.assign("5:1.cfg=7")
    assert nested["nodes"][4]["widgets_values"] == [7]


def test_a_changed_seed_is_stored_where_it_was_typed(known, nested):
    graph = workflow.from_document(nested, known())
    graph.assign("5:1.seed=9")
    assert nested["nodes"][4]["widgets_values"] == [9, 99]


def test_subgraphs_within_subgraphs(read, nested):
    outer = definition("outside", nested["nodes"][4])
    nested["definitions"]["subgraphs"].append(outer)
    outer["nodes"][0]["inputs"][4]["widget"] = {"name": "seed"}
    nested["nodes"][4] = {**nested["nodes"][4], "type": "outside"}
    flat = read(nested)
    assert flat.nodes["5:1:1"].inputs["seed"] == 77
    assert flat.nodes["6"].inputs["samples"].node == "5:1:1"


def test_two_instances_of_one_subgraph(read, nested):
    nested["nodes"].append({**copy.deepcopy(nested["nodes"][4]), "id": 50, "widgets_values": [1, 2]})
    flat = read(nested)
    assert (flat.nodes["5:1"].inputs["seed"], flat.nodes["50:1"].inputs["seed"]) == (77, 1)


def test_muted_and_bypassed_instances(read, nested):
    nested["nodes"][4]["mode"] = 4
    assert read(nested).nodes["6"].inputs["samples"].node == "4"
    nested["nodes"][4]["mode"] = 2
    assert "samples" not in read(nested).nodes["6"].inputs


def test_a_link_that_is_missing_within_is_named(read, nested):
    del nested["definitions"]["subgraphs"][0]["links"][0]
    with pytest.raises(NodeError, match=r'node 5:1 "Draw" \(KSampler\), input "model": its link is not in the file'):
        read(nested)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d.pop("nodes"), 'the subgraph of node 5 has no list "nodes"'),
        (lambda d: d["nodes"][0].update(type="inside"), "the subgraph of node 5:1 holds itself"),
        (lambda d: d["inputs"].clear(), "the subgraph of node 5 has no input 0"),
        (lambda d: d["nodes"][0].pop("id"), 'has no "id" or no "type"'),
        (lambda d: d.update(links=3), '"links" must be a list'),
    ],
)
def test_a_broken_subgraph_is_refused(read, nested, spoil, message):
    spoil(nested["definitions"]["subgraphs"][0])
    with pytest.raises(UsageError, match=message):
        read(nested)


def test_a_ring_through_subgraphs_is_refused(read, nested):
    inside = nested["definitions"]["subgraphs"][0]
    inside["links"][-1] = link(20, -10, 3, -20, 0, "LATENT")
    nested["links"][5] = [6, 5, 0, 5, 3, "LATENT"]
    with pytest.raises(UsageError, match="goes round in a ring through subgraphs"):
        read(nested)


def test_a_file_cannot_ask_for_endless_unfolding(read, nested):
    twice = [definition(f"level{i}", {"type": f"level{i + 1}", "inputs": []}, []) for i in range(40)]
    for one in twice:
        one["nodes"].append({**one["nodes"][0], "id": 2})
    nested["definitions"]["subgraphs"] += twice
    nested["nodes"].append({"id": 60, "type": "level0", "inputs": []})
    with pytest.raises(UsageError, match=r"Export \(API\)"):
        read(nested)
