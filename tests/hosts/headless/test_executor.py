"""Running a graph: each node once, lists item by item, what nodes may return, and what happens when they fail."""

from __future__ import annotations

import pytest
import torch

from retort.files import pictures as images
from retort.files.errors import NodeError
from retort.graphs.api import io

LOG: list = []


def node(name, execute, inputs=(), outputs=(), **schema):
    """A node class from its parts."""

    def define_schema(cls):
        return io.Schema(node_id=name, inputs=list(inputs), outputs=list(outputs), **schema)

    return type(name, (io.ComfyNode,), {"define_schema": classmethod(define_schema), "execute": classmethod(execute)})


@pytest.fixture(autouse=True)
def fresh_log():
    LOG.clear()


def count(cls, value):
    LOG.append(value)
    return io.NodeOutput(value + 1)


COUNT = node("Count", count, [io.Int.Input("value", default=0)], [io.Int.Output()])
SHOW = node("Show", lambda cls, value: LOG.append(("shown", value)), [io.Int.Input("value")], is_output_node=True)


def step(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def test_every_node_runs_once_and_equal_nodes_share_a_result(go):
    twice = {
        "a": step("Count", value=1), "b": step("Count", value=1), "c": step("Count", value=["a", 0]),
        "d": step("Count", value=["b", 0]), "x": step("Show", value=["c", 0]), "y": step("Show", value=["d", 0]),
        "z": step("Show", value=["a", 0]),
    }  # fmt: skip
    go(twice, COUNT, SHOW)
    assert [v for v in LOG if isinstance(v, int)] == [1, 2]
    assert [v for v in LOG if not isinstance(v, int)] == [("shown", 3), ("shown", 3), ("shown", 2)]


def test_nodes_that_no_output_needs_do_not_run(go):
    go({"a": step("Count", value=1), "b": step("Count", value=5), "x": step("Show", value=["a", 0])}, COUNT, SHOW)
    assert LOG == [1, ("shown", 2)]


def test_a_list_runs_item_by_item_and_arrives_whole_where_it_is_asked_for(go):
    def many(cls):
        return io.NodeOutput([1, 2, 3])

    def whole(cls, value, other):
        LOG.append((value, other))

    classes = [
        node("Many", many, outputs=[io.Int.Output(is_output_list=True)]),
        node("Whole", whole, [io.Int.Input("value"), io.Int.Input("other")], is_output_node=True, is_input_list=True),
    ]
    graph = {"m": step("Many"), "c": step("Count", value=["m", 0]), "w": step("Whole", value=["c", 0], other=7)}
    go(graph, COUNT, *classes)
    assert LOG == [1, 2, 3, ([2, 3, 4], [7])]


def test_what_a_node_may_return(go):
    async def later(cls):
        return io.NodeOutput(5)

    classes = [
        node("Later", later, outputs=[io.Int.Output()]),
        node("Tuple", lambda cls: (6,), outputs=[io.Int.Output()]),
        node("Dict", lambda cls: {"result": (7,), "ui": {"text": ["seven"]}}, outputs=[io.Int.Output()]),
    ]
    graph = {k: step(k) for k in ("Later", "Tuple", "Dict")}
    graph |= {f"s{k}": step("Show", value=[k, 0]) for k in list(graph)}
    assert go(graph, SHOW, *classes).texts == ["seven"]
    assert LOG == [("shown", 5), ("shown", 6), ("shown", 7)]


def test_a_node_learns_its_id_and_the_prompt_but_keeps_nothing(go):
    def tell(cls):
        LOG.append((cls.hidden.unique_id, cls.hidden.prompt["t"]["class_type"]))
        cls.state = 1

    teller = node("Tell", tell, hidden=[io.Hidden.unique_id, io.Hidden.prompt], is_output_node=True)
    go({"t": step("Tell")}, teller)
    assert LOG == [("t", "Tell")] and not hasattr(teller, "state") and teller.hidden.unique_id is None


def test_failures_name_the_node_and_leave_no_file(go, api, where):
    def value(cls, latent):
        raise ValueError("steps is 0; use 1 or more")

    def crash(cls, latent):
        return io.NodeOutput(latent["nothing"])

    def nan(cls, latent):
        return io.NodeOutput({"samples": latent["samples"] / 0})

    for execute, message in (
        (value, r'node 9 "Break": steps is 0; use 1 or more\.'),
        (crash, r"it failed with KeyError: 'nothing'\. --debug"),
        (nan, "its LATENT holds NaN or infinity"),
        (lambda cls, latent: io.NodeOutput(), "returned 0 of its 1 outputs"),
        (lambda cls, latent: 3, "it returned a int"),
        (lambda cls, latent: io.NodeOutput(latent, expand={}), "needs ComfyUI"),
    ):
        broken = node("Break", execute, [io.Latent.Input("latent")], [io.Latent.Output()])
        api["9"] = step("Break", latent=["5", 0])
        api["6"]["inputs"]["samples"] = ["9", 0]
        with pytest.raises(NodeError, match=message):
            go(api, broken)
    assert not where.output.exists()


def test_results_are_dropped_after_their_last_use_and_kept_when_asked_for(go):
    graph = {"a": step("Count", value=1), "b": step("Count", value=["a", 0]), "x": step("Show", value=["b", 0])}
    outcome = go(graph, COUNT, SHOW, keep={"a"})
    assert outcome.results.outputs == {"a": [[2]]}
    assert set(outcome.results.seconds) == {"a", "b", "x"}


def test_progress_reaches_the_watcher(go, api):
    class Watcher:
        def node(self, done, total, title):
            LOG.append((done, total, title))

        def step(self, done, total):
            LOG.append((done, total))

    go(api, watcher=Watcher())
    assert LOG[0] == (0, 7, "TinyLoader") and LOG[-1] == (7, 7, "")
    assert [e for e in LOG if len(e) == 2] == [(1, 3), (2, 3), (3, 3)]


def test_images_batch_and_save_under_comfyuis_names(go, where):
    for name, size in (("a.png", (16, 8)), ("b.png", (32, 32))):
        images.save_png(torch.rand(size[1], size[0], 3), where.inputs[0] / name)
    graph = {
        "1": step("LoadImage", image="a.png"), "2": step("LoadImage", image="b.png"),
        "3": step("ImageBatch", image1=["1", 0], image2=["2", 0]),
        "4": step("SaveImage", images=["3", 0], filename_prefix="sub/%width%x%height%_%batch_num%"),
        "5": step("PreviewImage", images=["3", 0]),
    }  # fmt: skip
    names = [p.relative_to(where.output).as_posix() for p in go(graph).saved]
    assert names == [
        "sub/16x8_0_00001_.png", "sub/16x8_1_00002_.png", "preview/preview_00001_.png", "preview/preview_00002_.png"
    ]  # fmt: skip
