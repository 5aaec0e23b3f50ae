"""Schemas built from what ComfyUI declares: the reader and the checks work with any class."""

from __future__ import annotations

import pytest

from retort.files.errors import NodeError
from retort.graphs import declared, run, validate, workflow

# As `/object_info` has them: V1 with a list of files and an upload button, V3 with dynamic combos and growing inputs.
INFO = {
    "Load": {
        "input": {"required": {"image": [["a.png", "b.png"], {"image_upload": True}]}},
        "output": ["IMAGE", "MASK"], "output_is_list": [False, False], "output_name": ["IMAGE", "MASK"],
    },
    "Sampler": {
        "input": {
            "required": {
                "model": ["IMAGE"], "seed": ["INT", {"default": 0, "min": 0, "max": 2**64 - 1}],
                "steps": ["INT", {"default": 20, "min": 1, "max": 100}], "cfg": ["FLOAT", {"default": 8.0}],
                "name": ["COMBO", {"options": ["euler", "heun"]}],
                "text": ["STRING", {"multiline": True, "dynamicPrompts": True}],
            },
            "optional": {"on": ["BOOLEAN", {"default": True}], "given": ["STRING", {"forceInput": True}]},
            "hidden": {"unique_id": "UNIQUE_ID"},
        },
        "output": ["LATENT"], "output_is_list": [False], "output_name": ["LATENT"],
    },
    "Dynamic": {
        "input": {
            "required": {
                "mode": ["COMFY_DYNAMICCOMBO_V3", {"options": [
                    {"key": "plain", "inputs": {"required": {}}},
                    {"key": "scaled", "inputs": {"required": {"factor": ["FLOAT", {"default": 2.0}]}}},
                ]}],
                "images": ["COMFY_AUTOGROW_V3", {"template": {
                    "input": {"required": {"image": ["IMAGE", {}]}}, "prefix": "image", "min": 1, "max": 3,
                }}],
            },
        },
        "output": ["IMAGE"], "output_is_list": [False], "output_name": ["IMAGE"],
    },
    "Save": {
        "input": {"required": {"images": ["IMAGE"], "filename_prefix": ["STRING", {"default": "x"}]}},
        "output": [], "output_is_list": [], "output_name": [], "output_node": True,
    },
}  # fmt: skip


@pytest.fixture
def classes():
    return declared.Declared(INFO, INFO.__getitem__, "the ComfyUI in a test")


def document(ui_node):
    return {
        "nodes": [
            ui_node(1, "Load", outputs=["IMAGE", "MASK"], values=["b.png", "image"]),
            ui_node(2, "Dynamic", [("images.image0", "IMAGE", 1), ("images.image1", "IMAGE", 2)], ["IMAGE"],
                    ["scaled", 3.5]),
            ui_node(3, "Sampler", [("model", "IMAGE", 3)], ["LATENT"],
                    [7, "randomize", 9, 2.5, "heun", "a {red} // no\nthree", False]),
            ui_node(4, "Save", [("images", "IMAGE", 4)], values=["%date:yyyy%"]),
        ],
        "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 1, 0, 2, 1, "IMAGE"], [3, 2, 0, 3, 0, "IMAGE"],
                  [4, 2, 0, 4, 0, "IMAGE"]],
    }  # fmt: skip


def test_widgets_by_position_are_read_by_the_declaration(classes, ui_node):
    prompt = workflow.from_document(document(ui_node), classes).prompt()
    assert prompt["1"]["inputs"] == {"image": "b.png"}
    assert prompt["2"]["inputs"] == {
        "mode": "scaled", "mode.factor": 3.5, "images.image0": ["1", 0], "images.image1": ["1", 0],
    }  # fmt: skip
    assert prompt["3"]["inputs"] == {
        "model": ["2", 0], "seed": 7, "steps": 9, "cfg": 2.5, "name": "heun", "text": "a red \nthree", "on": False,
    }  # fmt: skip
    assert prompt["4"]["inputs"]["filename_prefix"].isdigit()


def test_checks_work_for_any_class(classes, ui_node):
    graph = workflow.from_document(document(ui_node), classes)
    # The sampler feeds no output, so it does not run.
    assert validate.validate(graph, classes) == ["1", "2", "4"]
    wrong = {"1": {"class_type": "Load", "inputs": {"image": "c.png"}},
             "4": {"class_type": "Save", "inputs": {"images": ["1", 0]}}}  # fmt: skip
    with pytest.raises(NodeError, match="'c.png'.*a.png, b.png"):
        validate.validate(workflow.from_document(wrong, classes), classes)


def test_an_unknown_class_is_named_with_the_nearest(classes):
    strange = {"4": {"class_type": "Sav", "inputs": {}}, "1": {"class_type": "Save", "inputs": {"images": ["4", 0]}}}
    with pytest.raises(NodeError, match="'Sav' is not known to the ComfyUI in a test.*Did you mean Save"):
        validate.needed(workflow.from_document(strange, classes), classes)


def test_changes_are_made_before_the_prompt(classes, ui_node):
    graph = run.prepared(document(ui_node), classes, ["3.steps=30"], 5)
    assert graph.prompt()["3"]["inputs"]["steps"] == 30 and graph.prompt()["3"]["inputs"]["seed"] == 5


PAGE = {
    "Odd": {
        "input": {
            "required": {
                "image": [["a.png"], {"image_upload": True}], "size": ["INT", {"default": 4}],
                "noise_seed": ["INT", {"default": 0}],
            },
            "optional": {
                "way": ["COMBO", {"options": ["up", "down"], "control_after_generate": True}],
                "box": ["BOUNDING_BOX", {}], "colour": ["COLOR", {"default": "#fff"}], "view": ["IMAGECOMPARE", {}],
                "last": ["STRING", {"default": "end"}],
            },
        },
        "output": ["IMAGE"], "output_is_list": [False], "output_name": ["IMAGE"],
    },
    **INFO,
}  # fmt: skip
BOX = {"x": 1, "y": 2, "width": 3, "height": 4}


@pytest.fixture
def odd(ui_node):
    """odd(values, named) -> the inputs that the page would queue of a node with widgets of every kind."""

    def read(values, named=None):
        node = ui_node(1, "Odd", outputs=["IMAGE"], values=values)
        if named is not None:
            node["widgets_values_named"] = named
        known = declared.Declared(PAGE, PAGE.__getitem__, "a test")
        return workflow.from_document({"nodes": [node], "links": []}, known).prompt()["1"]["inputs"]

    return read


def test_every_widget_of_the_page_has_its_place(odd):
    """Behind a seed its control, behind a choice's control a filter, behind all that is required the upload button."""
    values = ["b.png", 7, 5, "whatever", "image", "down", "fixed", "", BOX, 1, 2, 3, 4, "#123456", "x", "left", "over"]
    assert odd(values) == {
        "image": "b.png", "size": 7, "noise_seed": 5, "way": "down", "box": BOX, "colour": "#123456",
        "view": {"__value__": ["", ""]}, "last": "x",
    }  # fmt: skip


def test_what_a_list_does_not_reach_is_the_default(odd):
    assert odd(["b.png"]) == {
        "image": "b.png", "size": 4, "noise_seed": 0, "way": "up", "colour": "#fff", "last": "end",
        "box": {"x": 0, "y": 0, "width": 512, "height": 512}, "view": {"__value__": ["", ""]},
    }  # fmt: skip


def test_names_tell_the_places_of_another_version_and_the_list_the_values(odd):
    """A widget that this version does not know stands in the middle; someone changed the list alone."""
    named = {"image": "a.png", "gone": 1, "size": 7, "noise_seed": 5, "control_after_generate": "fixed", "last": "x"}
    found = odd(["b.png", 1, 8, 5, "fixed", "y"], named)
    assert (found["image"], found["size"], found["noise_seed"], found["last"]) == ("b.png", 8, 5, "y")
    assert odd(["b.png", 3], named)["size"] == 3  # the list has others than the names


def test_a_change_is_stored_by_name_and_by_place(ui_node):
    node = ui_node(1, "Odd", outputs=["IMAGE"], values=["a.png", 7])
    node["widgets_values_named"] = {"image": "a.png", "size": 7}
    graph = run.prepared(
        {"nodes": [node], "links": []}, declared.Declared(PAGE, PAGE.__getitem__, "a test"), ["1.size=9"], None
    )
    saved = graph.document["nodes"][0]
    assert saved["widgets_values"] == ["a.png", 9] and saved["widgets_values_named"]["size"] == 9


def subgraph(ui_node, host_values, named=None, inner=1):
    """An instance of a subgraph whose inputs lead to a widget that no class has, a size and a seed; perhaps nested."""
    made = ui_node(5, "Odd", [("gone", "INT", 1), ("size", "INT", 2), ("noise_seed", "INT", 3)], ["IMAGE"], [])
    for one in made["inputs"]:
        one["widget"] = {"name": one["name"]}
    ends = [{"id": n, "origin_id": -10, "origin_slot": n - 1, "target_id": 5, "target_slot": n - 1} for n in (1, 2, 3)]
    inputs = [{"name": name, "type": "INT", "linkIds": [n]} for n, name in enumerate(("a", "b", "c"), 1)]
    definitions = [{"id": "inner", "nodes": [made], "links": ends, "inputs": inputs, "outputs": []}]
    kind = "inner"
    for depth in range(1, inner):
        nested = ui_node(5, kind, [(name, "INT", n) for n, name in enumerate(("a", "b", "c"), 1)], [], [])
        for one in nested["inputs"]:
            one["widget"] = {"name": one["name"]}
        kind = f"outer{depth}"
        definitions.append({"id": kind, "nodes": [nested], "links": ends, "inputs": inputs, "outputs": []})
    host = ui_node(2, kind, [("b", "INT", None)], [], host_values)
    host["inputs"][0]["widget"] = {"name": "b"}
    if named:
        host["widgets_values_named"] = named
    return {"nodes": [host], "links": [], "definitions": {"subgraphs": definitions}}


@pytest.mark.parametrize("inner", [1, 2])
def test_values_on_a_subgraph_belong_to_the_inputs_that_lead_to_a_widget(ui_node, inner):
    known = declared.Declared(PAGE, PAGE.__getitem__, "a test")
    (node,) = workflow.from_document(subgraph(ui_node, [8, 9], inner=inner), known).prompt().values()
    assert (node["inputs"]["size"], node["inputs"]["noise_seed"]) == (8, 9)
    (node,) = workflow.from_document(subgraph(ui_node, [8], inner=inner), known).prompt().values()
    assert (node["inputs"]["size"], node["inputs"]["noise_seed"]) == (8, 0)
    document = subgraph(ui_node, [1, 8, 9], {"a": 1, "b": 8, "c": 9}, inner)
    (node,) = workflow.from_document(document, known).prompt().values()
    assert (node["inputs"]["size"], node["inputs"]["noise_seed"]) == (8, 9)


def test_a_value_that_leads_to_a_socket_too_is_that_of_the_widget(ui_node):
    """As a size that a subgraph shows, which also goes to a node that shows it: nobody typed one."""
    known = declared.Declared(PAGE, PAGE.__getitem__, "a test")
    made = ui_node(5, "Odd", [("size", "INT", 1)], ["IMAGE"], ["a.png", 33])
    made["inputs"][0]["widget"] = {"name": "size"}
    shown = ui_node(6, "Sampler", [("given", "STRING", 2)], [], [])
    links = [{"id": n, "origin_id": -10, "origin_slot": 0, "target_id": 4 + n, "target_slot": 0} for n in (1, 2)]
    slot = {"name": "a", "type": "INT", "linkIds": [1, 2]}
    definition = {"id": "inner", "nodes": [made, shown], "links": links, "inputs": [slot], "outputs": []}
    host = ui_node(2, "inner", [("a", "INT", None)], [], [])
    document = {"nodes": [host], "links": [], "definitions": {"subgraphs": [definition]}}
    prompt = workflow.from_document(document, known).prompt()
    assert prompt["2:5"]["inputs"]["size"] == 33 and prompt["2:6"]["inputs"]["given"] == 33


def test_made_up_choices_and_the_number_of_the_chosen_one(ui_node):
    info = {"CustomCombo": {**INFO["Save"], "input": {"required": {"choice": ["COMBO", {"options": []}]}}}}
    known = declared.Declared(info, info.__getitem__, "a test")
    document = {"nodes": [ui_node(1, "CustomCombo", values=["b", 0, "a", "b", ""])], "links": []}
    assert workflow.from_document(document, known).prompt()["1"]["inputs"] == {
        "choice": "b", "index": 1, "option1": "a", "option2": "b", "option3": "",
    }  # fmt: skip


def test_a_prompt_that_is_typed_on_a_subgraph_stays_as_it_is(ui_node):
    """Braces and slashes of JSON or an address among it: ComfyUI's page changes what a node's own box holds alone."""
    known = declared.Declared(PAGE, PAGE.__getitem__, "a test")
    made = ui_node(5, "Sampler", [("text", "STRING", 1)], ["LATENT"], [])
    link = {"id": 1, "origin_id": -10, "origin_slot": 0, "target_id": 5, "target_slot": 0}
    slot = {"name": "text", "type": "STRING", "linkIds": [1]}
    definition = {"id": "inner", "nodes": [made], "links": [link], "inputs": [slot], "outputs": []}
    typed = '{"at": "https://example.org"} // {a|b}'
    nodes = [ui_node(2, "inner", [], [], [typed])]
    document = {"nodes": nodes, "links": [], "definitions": {"subgraphs": [definition]}}
    assert workflow.from_document(document, known).prompt()["2:5"]["inputs"]["text"] == typed


def test_a_primitive_node_reaches_no_node_within_a_subgraph(ui_node):
    """As on the page: the node within keeps its own value."""
    known = declared.Declared(PAGE, PAGE.__getitem__, "a test")
    document = subgraph(ui_node, [1, 8, 9])
    document["definitions"]["subgraphs"][0]["nodes"][0]["widgets_values"] = ["a.png", 33]
    host = document["nodes"][0]
    host["inputs"] = [{"name": "b", "type": "INT", "link": 7, "widget": {"name": "b"}}]
    document["nodes"].append(ui_node(3, "PrimitiveNode", outputs=["INT"], values=[5, "fixed"]))
    document["links"] = [[7, 3, 0, 2, 0, "INT"]]
    (node,) = workflow.from_document(document, known).prompt().values()
    assert node["inputs"]["size"] == 33
