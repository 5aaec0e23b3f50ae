"""What the editor does when it queues a workflow: choices in prompts, names of files, nodes of its own, metadata."""

from __future__ import annotations

import copy
import json
import random
import re
import time
from collections import Counter

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from retort.files import pictures
from retort.files.errors import NodeError, UsageError
from retort.graphs import editor, workflow

CASES = [
    ("a red seven", {"a red seven"}),
    ("a {red|blue} seven", {"a red seven", "a blue seven"}),
    ("{a|b {c|d}}", {"a", "b c", "b d"}),
    ("{|x}y", {"y", "xy"}),
    (r"\{a\|b\}", {"{a|b}"}),
    (r"{a\|b|c}", {"a|b", "c"}),
    ("{a|b", {"a", "b"}),
    ("a}", {"a}"}),
    ("a // said\nb", {"a \nb"}),
    ("a /* one\ntwo */b", {"a b"}),
    ("{only}", {"only"}),
    ("", {""}),
]


@pytest.mark.parametrize(("text", "outcomes"), CASES)
def test_choices_and_comments(text, outcomes):
    assert {editor.dynamic_prompt(text, random.Random(seed)) for seed in range(60)} == outcomes


def test_each_choice_is_as_likely():
    drawn = Counter(editor.dynamic_prompt("{a|b|c}", random.Random(seed)) for seed in range(3000))
    assert all(abs(count - 1000) < 150 for count in drawn.values()) and len(drawn) == 3


@pytest.fixture
def read(known):
    return lambda document, **given: workflow.from_document(copy.deepcopy(document), known(), **given)


def test_a_prompt_box_is_resolved_alike_for_one_seed_and_the_file_keeps_its_text(read, ui):
    ui["nodes"][1]["widgets_values"] = ["a {red|blue|green|black} seven // colour"]
    first = read(ui)
    assert first.nodes["2"].inputs["text"] == read(ui).nodes["2"].inputs["text"]
    assert re.fullmatch("a (red|blue|green|black) seven ", first.nodes["2"].inputs["text"])
    assert first.document["nodes"][1]["widgets_values"] == ["a {red|blue|green|black} seven // colour"]
    assert len({read(ui, seed=seed).nodes["2"].inputs["text"] for seed in range(20)}) > 1


def test_a_prompt_in_api_format_stays_as_it_is(read, api):
    api["2"]["inputs"]["text"] = "a {red|blue} seven // colour"
    assert read(api).nodes["2"].inputs["text"] == "a {red|blue} seven // colour"


def test_the_saved_prompt_says_what_was_drawn(go, ui):
    ui["nodes"][1]["widgets_values"] = ["a {red|blue} seven"]
    texts = pictures.read_texts(go(ui).saved[0])
    assert json.loads(texts["prompt"])["2"]["inputs"]["text"] in ("a red seven", "a blue seven")


def saver(ui):
    return next(node for node in ui["nodes"] if node["type"] == "SaveImage")


def test_names_of_files_take_the_date_and_the_values_of_other_nodes(read, ui):
    saver(ui)["widgets_values"] = ["%date:yyyy-MM-dd%/%Draw.sampler_name% %Draw.cfg% %Nobody.seed% %width%"]
    prefix = read(ui).nodes["7"].inputs["filename_prefix"]
    assert prefix == time.strftime("%Y-%m-%d") + "/euler 4 %Nobody.seed% %width%"


def test_a_value_in_a_name_cannot_name_a_folder(read, ui):
    ui["nodes"][1]["widgets_values"] = ["../../a zero"]
    ui["nodes"][1]["title"] = "Words"
    saver(ui)["widgets_values"] = ["%Words.text%"]
    assert read(ui).nodes["7"].inputs["filename_prefix"] == ".._.._a zero"


def test_nodes_of_other_packs_that_no_output_needs_are_left_out(go, ui, ui_node):
    ui["nodes"].append(ui_node(90, "Label (rgthree)", [], []))
    ui["nodes"].append({**ui_node(91, "Fast Groups Muter (rgthree)", [], ["*"]), "widgets_values": [1, 2, 3]})
    outcome = go(ui)
    assert len(outcome.saved) == 1
    assert [note for note in outcome.notes if "left out" in note] == [
        f'node {id} "{name}" is left out: its class {name!r} is not known here, and no output needs it'
        for id, name in ((90, "Label (rgthree)"), (91, "Fast Groups Muter (rgthree)"))
    ]


def test_a_node_of_another_pack_that_an_output_needs_is_refused_by_name(go, ui):
    ui["nodes"][2]["type"] = "CLIPTextEncode (other pack)"
    with pytest.raises(NodeError, match=r"the class 'CLIPTextEncode \(other pack\)' is not known"):
        go(ui)


def test_where_only_an_unknown_node_could_be_the_output_it_is_named(go, ui):
    saver(ui)["type"] = "Save Everything"
    with pytest.raises(NodeError, match="the class 'Save Everything' is not known"):
        go(ui)


def test_an_output_without_its_connection_does_not_stop_the_others(go, ui, ui_node):
    ui["nodes"].append(ui_node(90, "PreviewImage", [("images", "IMAGE", None)], []))
    outcome = go(ui)
    assert len(outcome.saved) == 1
    assert 'node 90 "Preview Image" is left out: nothing is connected to its input' in outcome.notes


EMPTY = ["{}", "null", '{"nodes": [], "links": [], "version": 0.4}', '""', "[]", "{ cut off"]
# Of notes alone, of a format that nobody knows, and of no object at all.
EMPTY += ['{"nodes": [{"id": 1, "type": "Note"}], "links": []}', '{"version": 9, "nodes": {}}', '"none"', "[1, 2]", "7"]


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_an_empty_workflow_beside_a_good_prompt_does_no_harm(go, api, tmp_path, empty, format):
    path, picture = tmp_path / "through_the_api", Image.new("RGB", (8, 8))
    if format == "PNG":
        info = PngInfo()
        info.add_text("prompt", json.dumps(api))
        info.add_text("workflow", empty)
        picture.save(path, format, pnginfo=info)
    else:
        exif = Image.Exif()
        exif[0x0110], exif[0x010F] = f"prompt:{json.dumps(api)}", f"workflow:{empty}"
        picture.save(path, format, exif=exif)
    want = go(copy.deepcopy(api), keep={"5"}).results.outputs["5"][0][0]["samples"]
    assert torch.equal(go(path, keep={"5"}).results.outputs["5"][0][0]["samples"], want)


def test_a_good_workflow_beside_a_damaged_prompt_is_run(go, ui, tmp_path):
    info = PngInfo()
    info.add_text("prompt", "{")
    info.add_text("workflow", json.dumps(ui))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    outcome = go(tmp_path / "a.png")
    assert len(outcome.saved) == 1 and any("is not valid JSON" in note for note in outcome.notes)


def test_pictures_without_a_workflow_say_so(go, tmp_path):
    path = tmp_path / "plain.jpg"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(UsageError, match=r"plain\.jpg carries no workflow"):
        go(path)
    info = PngInfo()
    info.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler a")
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png", pnginfo=info)
    with pytest.raises(UsageError, match="settings of AUTOMATIC1111, which are no workflow"):
        go(tmp_path / "other.png")
