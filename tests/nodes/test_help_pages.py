"""A help page says what, when, inputs, cost in calls and memory, shows a picture and names the paper; links resolve."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from retort import WEB_DIRECTORY
from retort.nodes import NODES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / WEB_DIRECTORY / "docs"
PICTURES = DOCS / "pictures"
SECTIONS = ["When to use it", "Inputs", "Outputs", "Cost"]
# No workflow of theirs draws on the embedded model yet.
WITHOUT_PICTURE = {"RetortTrainingPlan", "RetortFewShotAdapt", "RetortPreferencePicker", "RetortPromptQueue"}
# They carry files, numbers or several methods about; the pages of the methods name the papers.
WITHOUT_PAPER = {
    "RetortTrainingPlan",
    "RetortEmbeddedModel", "RetortCollectJob", "RetortLossChart", "RetortCombineRewards", "RetortScoreImages",
    "RetortCompareModels", "RetortPreferenceSet", "RetortLabelPairs", "RetortSaveSearch", "RetortLoadSearch",
    "RetortLoadGaussianStatistics", "RetortPreferencePicker", "RetortPromptQueue", "RetortCaption",
    "RetortCompareImages",
}  # fmt: skip


@pytest.fixture(params=NODES, ids=lambda node: node.__name__)
def page(request):
    name = request.param.__name__
    return name, (DOCS / f"{name}.md").read_text(encoding="utf-8")


def section(text: str, name: str) -> str:
    return re.split(r"\n## ", text.split(f"\n## {name}\n", 1)[1], maxsplit=1)[0].strip()


def test_sections_come_in_their_order(page):
    _, text = page
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert len(headings) == len(set(headings))
    assert [heading for heading in headings if heading in SECTIONS] == SECTIONS
    what = text.split("\n## ", 1)[0].split("\n", 1)[1].strip()
    assert len(what) > 40 and all(len(section(text, name)) > 30 for name in SECTIONS)


def test_the_cost_is_told_in_calls_and_memory(page):
    _, text = page
    cost = section(text, "Cost")
    assert re.search(r"\bcalls?\b", cost), cost
    assert re.search(r"[Mm]emory|\b[MG]B\b", cost), cost


def test_one_picture_says_what_it_shows(page):
    name, text = page
    shown = re.findall(r"!\[(.*?)\]\((.*?)\)", text)
    if name in WITHOUT_PICTURE:
        assert not shown
        return
    ((alternative, path),) = shown
    assert len(alternative) > 30 and text.index("](pictures/") < text.index("\n## When to use it")
    # ComfyUI reads it beside the page; other places, such as workflows/, it serves under a name that may differ.
    assert re.fullmatch(r"pictures/\w+\.jpg", path) and (DOCS / path).is_file()


def test_pictures_are_small_and_used():
    used = {path for page in DOCS.glob("*.md") for path in re.findall(r"pictures/\w+\.jpg", page.read_text("utf-8"))}
    assert {f"pictures/{path.name}" for path in PICTURES.iterdir()} == used
    for path in PICTURES.iterdir():
        assert path.stat().st_size < 60_000, path
        with Image.open(path) as image:
            image.load()
            assert image.format == "JPEG" and image.width <= 640
    assert sum(path.stat().st_size for path in (ROOT / WEB_DIRECTORY).rglob("*.jpg")) < 1_000_000


def test_links_lead_somewhere(page):
    """The panel opens links as they stand, so another page of ours cannot be one."""
    _, text = page
    for label, target in re.findall(r"(?<!!)\[([^\]]+)\]\(([^)]+)\)", text):
        assert target.startswith("https://"), target
        if "arxiv.org" in target:
            (number,) = re.findall(r"^https://arxiv\.org/abs/(\d{4}\.\d{4,5})$", target)
            assert label in (number, f"arXiv {number}")


def test_the_paper_is_named(page):
    name, text = page
    assert ("https://arxiv.org/abs/" in text) != (name in WITHOUT_PAPER)
