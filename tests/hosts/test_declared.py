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
