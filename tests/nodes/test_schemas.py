"""What every node promises a workflow and its user: stable ids, tooltips, a help page."""

from __future__ import annotations

import asyncio
import inspect
import re
from pathlib import Path

import pytest

from retort import WEB_DIRECTORY, comfy_entrypoint
from retort.hosts import api
from retort.hosts.api import io
from retort.nodes import NODES
from retort.nodes.checks import CheckedNode
from retort.nodes.inputs import schema

ROOT = Path(__file__).resolve().parents[2]

# Inputs of a dynamic choice are explained as other inputs are.
CHOICE = "COMFY_DYNAMICCOMBO_V3"
WIDGETS = ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN", CHOICE)


@pytest.fixture(params=NODES, ids=lambda node: node.__name__)
def node(request):
    return request.param


def test_the_entry_point_lists_the_nodes():
    extension = asyncio.run(comfy_entrypoint())
    assert isinstance(extension, api.ComfyExtension)
    asyncio.run(extension.on_load())
    assert asyncio.run(extension.get_node_list()) == NODES


def test_ids_are_the_names_of_the_classes(node):
    schema = node.GET_SCHEMA()
    assert schema.node_id == node.__name__
    assert schema.node_id.startswith("Retort")


def groups(node):
    """The inputs of a node, and those of each option of its choices."""
    inputs = node.GET_SCHEMA().inputs
    yield inputs
    for one in inputs:
        if one.get_io_type() == CHOICE:
            yield from (option.inputs for option in one.options)


def test_what_has_a_default_may_be_left_out_and_no_widget_moves_by_it(node):
    """Hosts put required inputs first, and workflows store widgets by place."""
    for inputs in groups(node):
        widgets = [one for one in inputs if one.get_io_type() in WIDGETS]
        assert sorted(widgets, key=lambda one: bool(one.optional)) == widgets, [one.id for one in widgets]
        for one in widgets:
            assert one.optional or one.get_io_type() == CHOICE or one.default is None, one.id


def test_every_option_of_a_choice_is_explained(node):
    places = (ROOT / WEB_DIRECTORY / "docs" / f"{node.__name__}.md", ROOT / "docs" / f"{node.__name__}.md")
    page = "\n".join(path.read_text(encoding="utf-8") for path in places if path.is_file())
    for one in node.GET_SCHEMA().inputs:
        if one.get_io_type() != CHOICE:
            continue
        for part in (part for option in one.options for part in option.inputs):
            assert part.tooltip and part.tooltip.endswith("."), part.id
            # A job's methods are those of the trainers' pages.
            if node.__name__ != "RetortTrainingJob":
                assert re.search(rf"(`|\*\*){part.id}(`|\*\*)", page), part.id


def test_everything_is_explained(node):
    schema = node.GET_SCHEMA()
    assert schema.display_name and schema.category.split("/")[-1] == "retort"
    assert len(schema.description) > 40 and schema.search_aliases
    for part in (*schema.inputs, *schema.outputs):
        assert part.tooltip and part.tooltip.endswith("."), part
    for part in schema.inputs:
        if part.get_io_type() in ("COMBO", "INT", "FLOAT", "STRING"):
            assert part.default is not None, f"{part.id} has no default"


def test_every_node_has_a_help_page(node):
    schema = node.GET_SCHEMA()
    page = (ROOT / WEB_DIRECTORY / "docs" / f"{schema.node_id}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {schema.display_name}\n")


def test_no_help_page_is_left_over():
    pages = {page.stem for page in (ROOT / WEB_DIRECTORY / "docs").glob("*.md")}
    assert pages == {node.GET_SCHEMA().node_id for node in NODES}


def test_the_setup_s_details_and_readme_list_every_preset():
    from retort.nodes import help_pages
    from retort.sampling.presets import PRESETS

    page = (help_pages.DETAILS / "RetortDistilledSetup.md").read_text(encoding="utf-8")
    assert all(f"\n- **{key}** (" in page for key in PRESETS)
    readme = help_pages.PRESET_PAGE.read_text(encoding="utf-8")
    assert help_pages.preset_table(readme) == readme, "run `python -m retort.nodes.help_pages`"
    assert all(f"\n| `{key}` |" in readme for key in PRESETS)


def test_what_a_prompt_may_leave_out_a_node_does_without(node):
    """Its argument has the same default as its input, or is completed by it."""
    taken = inspect.signature(node.execute).parameters
    free = any(one.kind is one.VAR_KEYWORD for one in taken.values())
    for one in node.GET_SCHEMA().inputs:
        if one.id not in taken:
            assert free, one.id
            continue
        usual = None if one.get_io_type() == CHOICE else getattr(one, "default", None)
        given = taken[one.id].default
        if usual is not None and given is not inspect.Parameter.empty:
            assert given == usual, one.id
        if one.optional and usual is None:
            assert given is not inspect.Parameter.empty, one.id


def test_a_node_runs_without_what_a_prompt_left_out():
    """Where its function has no default of its own, and where it takes further inputs by name."""
    seen = []

    class Node(CheckedNode):
        @classmethod
        def define_schema(cls):
            inputs = [
                io.Int.Input("a", default=1), io.Int.Input("b", default=2), io.Int.Input("c", default=3),
                io.Int.Input("d", default=4, min=0), io.Latent.Input("latent", optional=True),
            ]  # fmt: skip
            return schema(node_id="RetortTestOnly", inputs=inputs, outputs=[])

        @classmethod
        def execute(cls, a, b, c=3, **given):
            seen.append((a, b, c, given))

    Node.execute()
    Node.execute(5, c=7, d=0, latent=None)
    type("Copy", (Node,), dict(vars(Node))).execute(b=6)  # as ComfyUI copies it for a run
    assert seen == [(1, 2, 3, {"d": 4}), (5, 2, 7, {"d": 0, "latent": None}), (1, 6, 3, {"d": 4})]
