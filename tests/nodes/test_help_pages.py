"""A help page is short enough to be read beside the canvas: a recipe first, no table, an error list; the rest in docs/.

It says what, inputs, outputs, cost in calls and memory, shows a picture and names the paper; links resolve.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from retort import WEB_DIRECTORY
from retort.nodes import NODES

ROOT = Path(__file__).resolve().parents[2]
HELP = ROOT / WEB_DIRECTORY / "docs"
DETAILS = ROOT / "docs"
PICTURES = HELP / "pictures"
MOST_WORDS = 400
SECTIONS = ["Recipe", "Inputs", "Outputs", "Cost", "Errors"]
MODELS = r"\b(SD1\.5|SDXL|SD3|Flux|PixArt|Qwen|Wan|Z-Image)"
# No workflow of theirs draws on the embedded model yet.
WITHOUT_PICTURE = {
    "RetortLoraGrid", "RetortTrainingPlan", "RetortFewShotAdapt", "RetortPreferencePicker", "RetortPromptQueue",
    "RetortEditPairs", "RetortBlindTest",
}  # fmt: skip
# They carry files, numbers or several methods about; the pages of the methods name the papers.
WITHOUT_PAPER = {
    "RetortTrainingPlan", "RetortLoraGrid",
    "RetortEmbeddedModel", "RetortCollectJob", "RetortLossChart", "RetortCombineRewards", "RetortScoreImages",
    "RetortCompareModels", "RetortPreferenceSet", "RetortLabelPairs", "RetortSaveSearch", "RetortLoadSearch",
    "RetortLoadGaussianStatistics", "RetortPreferencePicker", "RetortPromptQueue", "RetortCaption",
    "RetortCompareImages", "RetortDemoPhotograph", "RetortLoadStudent", "RetortEditPairs", "RetortBlindTest",
}  # fmt: skip


@pytest.fixture(params=NODES, ids=lambda node: node.__name__)
def page(request):
    name = request.param.__name__
    return name, (HELP / f"{name}.md").read_text(encoding="utf-8")


def section(text: str, name: str) -> str:
    return re.split(r"\n## ", text.split(f"\n## {name}\n", 1)[1], maxsplit=1)[0].strip()


def shown(text: str) -> str:
    """A page's text as it is read: of links and pictures the words alone."""
    return re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)


def details(name: str) -> str:
    path = DETAILS / f"{name}.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def explained(text: str) -> set[str]:
    """The names that a page sets in bold or as code, those of ranges such as weight_1 to weight_4 too."""
    found = set(re.findall(r"\*\*(\w+)\*\*|`(\w+)`", text))
    names = {name for pair in found for name in pair if name}
    for stem, first, last in re.findall(r"\*\*(\w+_)(\d)\*\* to \*\*\w+_(\d)\*\*", text):
        names |= {f"{stem}{i}" for i in range(int(first), int(last) + 1)}
    return names


@cache
def sources() -> str:
    """What our own code says, in one line for each message."""
    folders = ("nodes", "hosts", "sampling", "rewards", "restoration", "trainers", "preferences", "files", "models")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    files += sorted((ROOT / WEB_DIRECTORY).rglob("*.mjs"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_a_page_is_short_and_holds_no_table(page):
    _, text = page
    words = [word for word in shown(text).split() if re.search(r"\w", word)]
    assert len(words) <= MOST_WORDS
    assert not [line for line in text.splitlines() if line.lstrip().startswith("|")]


def test_details_are_text_that_a_browser_wraps():
    """They are shown as they are written: no table there either, and no page without a way to it."""
    for path in DETAILS.glob("Retort*.md"):
        text = path.read_text(encoding="utf-8")
        assert not [line for line in text.splitlines() if line.lstrip().startswith("|")], path
        assert f"](../{WEB_DIRECTORY.removeprefix('./')}/docs/{path.name})" in text
        assert f"](../../../docs/{path.name})" in (HELP / path.name).read_text(encoding="utf-8"), path


def test_the_recipe_comes_first_with_numbers_for_a_real_model(page):
    _, text = page
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert len(headings) == len(set(headings))
    assert [heading for heading in headings if heading in SECTIONS] == SECTIONS and headings[0] == "Recipe"
    what = text.split("\n## ", 1)[0].split("\n", 1)[1].strip()
    assert len(what) > 40 and all(len(section(text, name)) > 30 for name in SECTIONS)
    recipe = section(text, "Recipe")
    assert re.search(r"\d", re.sub(MODELS, "", recipe)), recipe
    assert re.search(MODELS, recipe) or re.search(MODELS, text)


def test_every_input_and_output_is_explained(page):
    """What the node shows at first on the page itself, what it hides as advanced there or in docs/."""
    name, text = page
    schema = next(node for node in NODES if node.__name__ == name).GET_SCHEMA()
    at_once, further = explained(text), explained(details(name))
    for part in schema.inputs:
        hidden = getattr(part, "advanced", None)
        assert part.id in (at_once | further if hidden else at_once), part.id
    for part in schema.outputs:
        assert part.get_io_type() in at_once, part


def test_errors_are_those_that_can_be_met(page):
    """Every message that a page quotes is in the code, piece by piece where numbers stand between."""
    name, text = page
    quoted = [part for line in section(text, "Errors").splitlines() if line.startswith("- ")
              for part in re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", line.split(":", 1)[0])]  # fmt: skip
    assert quoted
    if name == "RetortSaveSearch":  # the system's own words
        return
    for message in quoted:
        pieces = [piece.strip() for piece in message.split("…")]
        assert all(piece in sources() for piece in pieces) and max(map(len, pieces)) >= 4, message


def test_the_cost_is_told_in_calls_and_memory(page):
    _, text = page
    cost = section(text, "Cost")
    assert re.search(r"\bcalls?\b", cost), cost
    assert re.search(r"[Mm]emory|\b[MG]B\b", cost), cost


def test_one_picture_says_what_it_shows(page):
    name, text = page
    pictures = re.findall(r"!\[(.*?)\]\((.*?)\)", text)
    if name in WITHOUT_PICTURE:
        assert not pictures
        return
    ((alternative, path),) = pictures
    assert len(alternative) > 30 and text.index("](pictures/") < text.index("\n## ")
    # ComfyUI reads it beside the page; other places, such as workflows/, it serves under a name that may differ.
    assert re.fullmatch(r"pictures/\w+\.jpg", path) and (HELP / path).is_file()


def test_pictures_are_small_and_used():
    used = {path for page in HELP.glob("*.md") for path in re.findall(r"pictures/\w+\.jpg", page.read_text("utf-8"))}
    assert {f"pictures/{path.name}" for path in PICTURES.iterdir()} == used
    for path in PICTURES.iterdir():
        assert path.stat().st_size < 60_000, path
        with Image.open(path) as image:
            image.load()
            assert image.format == "JPEG" and image.width <= 640
    assert sum(path.stat().st_size for path in (ROOT / WEB_DIRECTORY).rglob("*.jpg")) < 1_000_000


def links(path: Path) -> list[tuple[str, str]]:
    return re.findall(r"(?<!!)\[([^\]]+)\]\(([^)]+)\)", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted([*HELP.rglob("*.md"), *DETAILS.glob("*.md")]), ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    """The panel opens links as they stand; from a help page into the repository they lead to docs/ (help_routes)."""
    for label, target in links(path):
        if not target.startswith("https://"):
            place, _, heading = target.partition("#")
            found = (path.parent / place).resolve() if place else path
            assert found.exists(), target
            assert HELP not in path.parents or found.parent == DETAILS, target
            if heading:
                titles = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
                assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target
        elif "arxiv.org" in target:
            (number,) = re.findall(r"^https://arxiv\.org/abs/(\d{4}\.\d{4,5})$", target)
            assert label in (number, f"arXiv {number}")


def test_the_paper_is_named(page):
    name, text = page
    assert ("https://arxiv.org/abs/" in text) != (name in WITHOUT_PAPER)


TRANSLATED = sorted(HELP.glob("*/*.md"))


def quoted(text: str) -> set[str]:
    """Messages that a page quotes: no language of ours but English has them."""
    return {one for one in re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", text) if one.isascii() or "…" in one}


@pytest.mark.parametrize("path", TRANSLATED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_translation_says_what_the_english_page_says(path):
    """The same inputs, messages, numbers of the recipe and links, under the name that the catalogue has; no table."""
    node = next(node for node in NODES if node.__name__ == path.parent.name)
    text, english = (one.read_text(encoding="utf-8") for one in (path, HELP / f"{node.__name__}.md"))
    catalogue = json.loads((HELP.parent / "locales" / f"{path.stem}.json").read_text(encoding="utf-8"))
    assert text.startswith(f"# {catalogue['nodes'][node.GET_SCHEMA().display_name]}\n")
    ids = {part.id for part in node.GET_SCHEMA().inputs}
    assert explained(text) & ids == explained(english) & ids
    assert {one for one in quoted(text) if one in sources()} <= quoted(english)
    recipe = text.split("\n## ")[1]
    numbers = set(re.findall(r"\d[\d.e-]*\d|\d", section(english, "Recipe")))
    assert numbers <= set(re.findall(r"\d[\d.e-]*\d|\d", recipe)), numbers
    assert {target.replace("../../../../docs", "../../../docs") for _, target in links(path)} <= {
        target for _, target in links(HELP / f"{node.__name__}.md")
    }
    assert not [line for line in text.splitlines() if line.lstrip().startswith("|")]
    (picture,) = re.findall(r"\]\((pictures/\w+\.jpg)\)", text) or [None]
    assert picture is None or (HELP / picture).is_file()


def test_the_most_used_pages_are_translated():
    for language in ("zh", "ja"):
        assert len([path for path in TRANSLATED if path.stem == language]) >= 10
