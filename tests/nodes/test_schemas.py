"""What every node promises a workflow and its user: stable ids, tooltips, a help page."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from retort import WEB_DIRECTORY, comfy_entrypoint
from retort.hosts import api
from retort.nodes import NODES

ROOT = Path(__file__).resolve().parents[2]

# Workflows store widgets by position: names never change, and new ones come last.
INPUTS = {
    "RetortEmbeddedModel": ["variant"],
    "RetortDistilledSetup": ["model", "positive", "negative", "preset", "steps", "timesteps", "denoise"],
    "RetortDistilledSigmas": ["model", "preset", "steps", "timesteps", "denoise"],
    "RetortDistilledSampler": ["preset", "mode", "start"],
}
OUTPUTS = {
    "RetortEmbeddedModel": ["MODEL", "CLIP", "VAE"],
    "RetortDistilledSetup": ["MODEL", "GUIDER", "SAMPLER", "SIGMAS"],
    "RetortDistilledSigmas": ["SIGMAS"],
    "RetortDistilledSampler": ["SAMPLER"],
}


@pytest.fixture(params=NODES, ids=lambda node: node.__name__)
def node(request):
    return request.param


def test_the_entry_point_lists_the_nodes():
    extension = asyncio.run(comfy_entrypoint())
    assert isinstance(extension, api.ComfyExtension)
    asyncio.run(extension.on_load())
    assert asyncio.run(extension.get_node_list()) == NODES
    assert {node.GET_SCHEMA().node_id for node in NODES} == set(INPUTS)


def test_ids_and_order(node):
    schema = node.GET_SCHEMA()
    assert schema.node_id == node.__name__
    assert schema.node_id.startswith("Retort")
    assert [i.id for i in schema.inputs] == INPUTS[schema.node_id]
    assert [o.get_io_type() for o in schema.outputs] == OUTPUTS[schema.node_id]


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
    for heading in ("When to use it", "Inputs", "Outputs", "Cost"):
        assert f"\n## {heading}\n" in page
    for part in schema.inputs:
        assert f"\n| {part.id} |" in page
    for part in schema.outputs:
        assert f"\n| {part.get_io_type()} |" in page


def test_no_help_page_is_left_over():
    pages = {page.stem for page in (ROOT / WEB_DIRECTORY / "docs").glob("*.md")}
    assert pages == {node.GET_SCHEMA().node_id for node in NODES}


def test_the_setup_page_lists_every_preset():
    from retort.sampling.presets import PRESETS

    page = (ROOT / WEB_DIRECTORY / "docs" / "RetortDistilledSetup.md").read_text(encoding="utf-8")
    first = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    assert set(PRESETS) <= {name.strip() for cell in first for name in cell.split(",")}
