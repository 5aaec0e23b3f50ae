"""A template can be read as it opens: it is small, nothing covers anything, and its note stands first, at full size."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import snapshots

WORKFLOWS = sorted((Path(__file__).resolve().parent.parent / "workflows").glob("*.json"))
QUICK_START = "1 Quick start - 4 steps instead of 50"
TITLE = 30  # above a node's own place
GROUP_TITLE = 34  # below a group's upper edge
SHOW_RUNS = {
    "RetortTrainDistillation", "RetortTrainFlow", "RetortFewShotAdapt", "RetortTrainPreference", "RetortTrainReward",
    "RetortTrainRestorer", "RetortTrainingJob", "RetortCollectJob",
}  # fmt: skip
RUN = 368  # what such a node grows by
# What the smallest page that we count on shows of the graph, beside its bars.
SCREEN = (84, 90, 1366, 768)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def box(node: dict[str, Any]) -> tuple[float, float, float, float]:
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + (0 if node["flags"].get("collapsed") else height)


def note(document: dict[str, Any]) -> dict[str, Any]:
    (found,) = (node for node in document["nodes"] if node["type"] == "MarkdownNote")
    return found


def cover(one: tuple, two: tuple) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


def test_it_fits(path) -> None:
    document = read(path)
    boxes = [box(node) for node in document["nodes"]]
    for group in document["groups"]:
        x, y, width, height = group["bounding"]
        boxes.append((x, y, x + width, y + height))
    width = max(b[2] for b in boxes) - min(b[0] for b in boxes)
    height = max(b[3] for b in boxes) - min(b[1] for b in boxes)
    most = (1400, 700) if path.stem == QUICK_START else (1700, 900)
    assert width <= most[0] and height <= most[1], f"{width:.0f} x {height:.0f}"


def test_nothing_covers_anything(path) -> None:
    document = read(path)
    for one, two in combinations(document["nodes"], 2):
        assert not cover(box(one), box(two)), (one["id"], two["id"])
    for group in document["groups"]:
        x, y, width, _ = group["bounding"]
        title = (x, y, x + width, y + GROUP_TITLE)
        assert not [node["id"] for node in document["nodes"] if cover(box(node), title)], group["title"]


def test_nothing_lies_where_a_training_will_show_its_run(path) -> None:
    """A training node grows by its run's curve and previews, which would cover what is below it."""
    nodes = [node for node in read(path)["nodes"] if not node["flags"].get("collapsed")]
    for node in (one for one in nodes if one["type"] in SHOW_RUNS):
        left, _, right, bottom = box(node)
        grown = (left, bottom, right, bottom + RUN)
        assert not [other["id"] for other in read(path)["nodes"] if cover(box(other), grown)], node["type"]


def test_it_opens_at_its_note_at_full_size(path) -> None:
    document = read(path)
    first = note(document)
    assert first["size"][0] == 420
    assert document["extra"]["retort"] == {"opens": "extra.ds"}
    view = document["extra"]["ds"]
    assert view["scale"] == 1
    left, top, right, bottom = box(first)
    x, y = view["offset"]
    assert SCREEN[0] <= left + x and SCREEN[1] <= top + y and right + x <= SCREEN[2] and bottom + y <= SCREEN[3]


def test_its_note_is_short_and_says_what_is_true(path) -> None:
    text = note(read(path))["widgets_values"][0]
    assert text.startswith("# ") and len(re.sub(r"\S*huggingface\S*", "", text).split()) <= 125
    named = re.findall(r"\*(\w+ - [^*]+|\d [^*]+)\*", text)
    assert set(named) <= {each.stem for each in WORKFLOWS}, named
    assert "(?)" not in text


def test_names_can_be_files_everywhere() -> None:
    """Their order in the list is that of the alphabet."""
    for each in WORKFLOWS:
        assert re.fullmatch(r"[A-Za-z0-9,. -]+", each.stem), each.stem
    assert [each.stem[:2] for each in WORKFLOWS][:6] == [f"{number} " for number in range(1, 7)]


def test_its_thumbnail_is_the_one_that_is_made_of_results(path) -> None:
    """And says whether it needs files."""
    image = pytest.importorskip("PIL.Image")
    from retort.benchmarks.thumbnails import SIZE, thumbnail, words

    needy = snapshots.DOWNLOADS | snapshots.PUBLISHED | snapshots.TRAINED
    assert ("needs" in words(path.stem)) == (path.stem in needy)
    with image.open(path.with_suffix(".jpg")) as kept:
        assert kept.size == SIZE
        made, found = (one.convert("L").resize((24, 18)).tobytes() for one in (thumbnail(path.stem), kept))
    assert max(abs(a - b) for a, b in zip(made, found, strict=True)) < 12
