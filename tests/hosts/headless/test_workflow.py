"""Reading workflows: both formats, PNG files, and what the editor does with muted, bypassed and virtual nodes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from PIL import Image

from retort.files import pictures as images
from retort.files.errors import NodeError, UsageError
from retort.graphs import workflow
from retort.graphs.api import io
from retort.graphs.api.schema import ExecutionBlocker
from retort.graphs.graph import Link


@pytest.fixture
def read(known):
    return lambda document, *classes: workflow.from_document(copy.deepcopy(document), known(*classes))


def latent(outcome):
    return outcome.results.outputs["5"][0][0]["samples"]


def test_both_formats_give_the_same_graph_and_latent(go, read, api, ui):
    a, b = read(api), read(ui)
    assert {n.id: (n.class_type, n.inputs) for n in a.nodes.values()} == {
        n.id: (n.class_type, n.inputs) for n in b.nodes.values()
    }
    assert torch.equal(latent(go(api, keep={"5"})), latent(go(ui, keep={"5"})))


def test_version_1_links_are_objects(read, ui):
    newer = copy.deepcopy(ui)
    newer["version"] = 1
    newer["links"] = [
        {"id": l[0], "origin_id": l[1], "origin_slot": l[2], "target_id": l[3], "target_slot": l[4], "type": l[5]}
        for l in ui["links"]  # noqa: E741
    ]
    assert read(newer).nodes == read(ui).nodes


def test_widgets_by_position_skip_what_happens_to_the_seed(read, ui):
    node = read(ui).nodes["5"]
    assert (node.inputs["seed"], node.inputs["cfg"], node.inputs["sampler_name"]) == (5, 4.0, "euler")
    assert node.inputs["steps"] == 3  # from the primitive, not the 99 that the converted widget still stores
    ui["nodes"][4]["widgets_values"] = {"seed": 8, "cfg": 2.0}
    assert read(ui).nodes["5"].inputs["seed"] == 8


def test_a_muted_source_is_no_connection(go, ui):
    ui["nodes"][2]["mode"] = 2
    with pytest.raises(NodeError, match=r'node 5 "Draw" \(KSampler\), input "negative": a CONDITIONING is required'):
        go(ui)


def test_a_bypassed_node_hands_its_input_of_the_same_type_through(read, ui, ui_node):
    ui["nodes"].append(
        ui_node(11, "LoraLoader", [("model", "MODEL", 12), ("clip", "CLIP", 13)], ["MODEL", "CLIP"], mode=4)
    )
    ui["links"] += [[12, 1, 0, 11, 0, "MODEL"], [13, 1, 1, 11, 1, "CLIP"]]
    ui["links"][10][1] = 11  # the reroute now hangs on the bypassed node
    ui["links"][0][1] = 11
    graph = read(ui)
    assert "11" not in graph.nodes
    assert graph.nodes["5"].inputs["model"] == Link("1", 0)
    assert graph.nodes["2"].inputs["clip"] == Link("1", 1)


def test_a_ring_of_reroutes_is_named(read, ui):
    ui["links"][10][1] = 8
    with pytest.raises(NodeError, match="reroutes that form a ring"):
        read(ui)


def test_saved_images_carry_their_workflow_and_run_again(go, api, ui, where):
    first = go(ui, keep={"5"}, seed=11)
    texts = images.read_texts(first.saved[0])
    assert json.loads(texts["workflow"])["nodes"][4]["widgets_values"][0] == 11
    assert json.loads(texts["prompt"])["5"]["inputs"]["seed"] == 11
    assert torch.equal(latent(go(first.saved[0], keep={"5"})), latent(first))
    only_prompt = go(api).saved[0]
    assert set(images.read_texts(only_prompt)) == {"prompt"}
    assert torch.equal(latent(go(only_prompt, keep={"5"})), latent(go(api, keep={"5"})))


def test_a_png_with_subgraphs_runs_the_prompt_beside_them(go, api, ui, where, tmp_path):
    nested = copy.deepcopy(ui)
    nested["definitions"] = {"subgraphs": [{"id": "8f3c", "name": "My sampler"}]}
    nested["nodes"][4]["type"] = "8f3c"
    path = tmp_path / "nested.png"
    images.save_png(torch.zeros(8, 8, 3), path, {"prompt": api, "workflow": nested})
    outcome = go(path)
    assert "definitions" in json.loads(images.read_texts(outcome.saved[0])["workflow"])


def test_set_reaches_nodes_by_id_title_and_dotted_input(read, ui):
    graph = read(ui)
    for assignment in ("5.cfg=2.5", "Draw.seed=7", "2.text=an = sign, and a.dot", "9.x=1"):
        if assignment.startswith("9"):
            with pytest.raises(UsageError, match="no node has this id or title; there are 1"):
                graph.assign(assignment)
        else:
            graph.assign(assignment)
    assert graph.nodes["5"].inputs["cfg"] == 2.5 and graph.nodes["5"].inputs["seed"] == 7
    assert graph.nodes["2"].inputs["text"] == "an = sign, and a.dot"
    assert graph.document["nodes"][4]["widgets_values"][3] == 2.5


def test_set_on_a_primitive_changes_all_that_it_feeds(read, ui):
    graph = read(ui)
    graph.assign("Draw.steps=6")
    assert graph.document["nodes"][8]["widgets_values"][0] == 6


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("5.steps", "write NODE.INPUT=VALUE"),
        ("5.stepz=3", "no such input; it has seed, steps"),
        ("5.model=x", "connected to node 1"),
        ("CLIPTextEncode.text=x", "2 nodes have this title; use an id: 2, 3"),
    ],
)
def test_set_says_what_is_wrong(read, api, assignment, message):
    with pytest.raises(UsageError, match=message):
        read(api).assign(assignment)


def test_seed_reaches_every_seed(read, api):
    graph = read(api)
    graph.set_seed(2**63)
    assert graph.nodes["5"].inputs["seed"] == 2**63
    del api["5"]
    with pytest.raises(UsageError, match="no node has an input"):
        read(api).set_seed(1)


def test_a_prompt_as_posted_to_comfyui_is_unwrapped(read, api):
    assert read({"prompt": api, "client_id": "x"}).nodes.keys() == api.keys()


class Growing(io.ComfyNode):
    """A node with dynamic inputs that shows what it received."""

    received: list = []

    @classmethod
    def define_schema(cls):
        template = io.Autogrow.TemplatePrefix(io.Image.Input("image"), prefix="image", min=1, max=4)
        fast = [io.Int.Input("steps", default=4), io.Float.Input("late", default=0.5)]
        return io.Schema(
            node_id="Growing",
            inputs=[
                io.DynamicCombo.Input(
                    "method",
                    options=[io.DynamicCombo.Option("plain", []), io.DynamicCombo.Option("fast", fast)],
                ),
                io.String.Input("name", default="x"),
                io.Autogrow.Input("images", template=template),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, method, name, images):
        Growing.received.append((method, name, sorted(images)))
        return io.NodeOutput(ui={"text": (name,)})


def test_dynamic_inputs_arrive_as_in_comfyui(go, ui, ui_node, where):
    images.save_png(torch.rand(16, 16, 3), where.inputs[0] / "a.png")
    load = ui_node(1, "LoadImage", outputs=["IMAGE", "MASK"], values=["a.png", "image"])
    grow = ui_node(2, "Growing", [("images.image0", "IMAGE", 1)], values=["fast", 8, 0.25, "hello"])
    ui.update(nodes=[load, grow], links=[[1, 1, 0, 2, 0, "IMAGE"]])
    Growing.received.clear()
    assert go(ui, Growing).texts == ["hello"]
    as_api = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
        "2": {
            "class_type": "Growing",
            "inputs": {"method": "fast", "method.steps": 8, "name": "hello", "images.image0": ["1", 0]},
        },
    }
    outcome = go(as_api, Growing)
    assert Growing.received == [
        ({"method": "fast", "steps": 8, "late": 0.25}, "hello", ["image0"]),
        ({"method": "fast", "steps": 8, "late": 0.5}, "hello", ["image0"]),
    ]
    assert outcome.notes == []


def test_a_note_says_what_an_older_save_lacks_and_the_prompt_has_its_default(go, ui, known):
    ui["nodes"][4]["widgets_values"] = [5, "fixed", 99, 4.0, "euler", "simple"]
    older = copy.deepcopy(ui)
    assert workflow.from_document(older, known()).prompt()["5"]["inputs"]["denoise"] == 1.0
    assert go(ui).notes == ['node 5 "Draw": saved before denoise existed; the default is used']


def test_defaults_are_not_added_behind_a_gap(ui, known):
    """A seed has a second value behind it in the editor's list: what would follow has no certain place."""
    ui["nodes"][4]["widgets_values"] = []
    older = copy.deepcopy(ui)
    inputs = workflow.from_document(older, known()).prompt()["5"]["inputs"]
    assert older["nodes"][4]["widgets_values"] == [] and not {"seed", "cfg", "denoise"} & set(inputs)


def test_transparency_becomes_a_mask(where):
    picture = Image.new("RGBA", (8, 4), (255, 0, 0, 64))
    picture.save(where.inputs[0] / "clear.png")
    image, mask = images.load_image(where.image("clear.png"))
    assert image.shape == (1, 4, 8, 3) and mask.shape == (1, 4, 8)
    assert torch.allclose(mask, torch.tensor(1 - 64 / 255))


def test_a_blocked_output_leaves_out_what_needs_it(go):
    ran = []

    class Source(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="Source", outputs=[io.Int.Output(), io.Int.Output()])

        @classmethod
        def execute(cls):
            return io.NodeOutput(ExecutionBlocker(None), 3)

    class Shows(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(
                node_id="Shows", inputs=[io.Int.Input("value")], outputs=[io.Int.Output()], is_output_node=True
            )

        @classmethod
        def execute(cls, value):
            ran.append(value)
            return io.NodeOutput(value)

    prompt = {
        "1": {"class_type": "Source", "inputs": {}},
        "2": {"class_type": "Shows", "inputs": {"value": ["1", 0]}},
        "3": {"class_type": "Shows", "inputs": {"value": ["2", 0]}},
        "4": {"class_type": "Shows", "inputs": {"value": ["1", 1]}},
    }
    go(prompt, Source, Shows)
    assert ran == [3]


@pytest.mark.parametrize(("setter", "getter"), [("SetNode", "GetNode"), ("easy setNode", "easy getNode")])
def test_values_that_are_set_and_got_by_name_are_followed(read, ui, ui_node, setter, getter):
    plain = read(ui).nodes["5"].inputs
    link = next(one for one in ui["links"] if one[3] == 5 and one[5] == "LATENT")
    ui["nodes"] += [
        ui_node(30, getter, [], ["LATENT"], ["mine"]),
        ui_node(31, setter, [("LATENT", "LATENT", 90)], ["*"], ["mine"]),
        ui_node(32, setter, [("LATENT", "LATENT", None)], ["*"], ["another"]),
        ui_node(33, "Reroute (rgthree)", [("", "*", 91)], ["*"]),
    ]
    ui["links"] += [[90, 33, 0, 31, 0, "*"], [91, link[1], link[2], 33, 0, "LATENT"]]
    link[1:3] = [30, 0]
    graph = read(ui)
    assert graph.nodes["5"].inputs == plain and not {"30", "31", "32", "33"} & set(graph.nodes)
    ui["nodes"][-3]["widgets_values"] = ["other"]
    with pytest.raises(NodeError, match=rf"node 5 .*node 30 \({getter}\) gets 'mine', which no node sets"):
        read(ui)
    # What one sets who is fed by nothing is nothing.
    ui["nodes"][-4]["widgets_values"] = ["another"]
    assert len(read(ui).nodes["5"].inputs) == len(plain) - 1


def test_a_group_node_is_named_as_one(go, ui):
    for name in ("workflow>Mine", "workflow/Mine"):
        ui["nodes"][1]["type"] = name
        with pytest.raises(NodeError, match="is a group node, which ComfyUI's page takes apart .*makes a subgraph"):
            go(ui)


def test_what_programs_put_around_a_workflow_is_taken_off(read, api, ui):
    from_api, from_ui = read(api).nodes, read(ui).nodes
    entry = {"prompt": [3, "some-id", api, {"extra_pnginfo": {}}, ["7"]], "outputs": {}, "status": {}}
    for around in (
        {"prompt": api, "client_id": "x"}, {"workflow": ui, "output": api}, {"prompt": entry["prompt"]}, entry,
        {"some-id": entry}, json.dumps(api),
    ):  # fmt: skip
        assert read(around).nodes == from_api
    for around in ({"workflow": ui}, json.dumps(ui), {"workflow": ui, "prompt": None}):
        assert read(around).nodes == from_ui
    for none in ({"a": entry, "b": entry}, {"prompt": []}, {"prompt": "x"}, {"workflow": {}}, json.dumps("x"), "x", {}):
        with pytest.raises(UsageError, match="this is not a workflow"):
            read(none)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\0\0\0\x20ftypisom\0\0\2\0", "of the kind of MP4 and HEIC"),
        (b"\x1aE\xdf\xa3\1", "a WebM or Matroska video"), (b"GIF89a", "a GIF"),
        (b"II*\0\x08\0", "a TIFF"), (b"fLaC\0", "a sound"), (b"PK\x03\x04", "a ZIP archive"),
        (b"\n<!DOCTYPE html>", r"a page or a drawing"), (b"glTF\2\0", "a 3D model"),
    ],
)  # fmt: skip
def test_files_of_other_kinds_are_named(known, tmp_path, data, kind):
    (tmp_path / "given").write_bytes(data + bytes(40))
    with pytest.raises(UsageError, match=f"given is {kind}.*JSON and from PNG, WebP, JPEG and AVIF.*Workflow > Save"):
        workflow.read(tmp_path / "given", known())
