"""README is short, all that it and the pages in docs/ link to is there, and its moving pictures move and are small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "ARCHITECTURE", "CONTRIBUTING", "SECURITY"))]
PAGES += sorted(ROOT.glob("docs/*.md"))
MOST_WORDS = 1200


def links(path: Path) -> list[tuple[Path, str]]:
    """(file, heading or "") that a page links to or shows, addresses of other places left out."""
    found = re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", path.read_text(encoding="utf-8"))
    return [((path.parent / place).resolve() if place else path, heading) for place, heading in found]


def test_it_is_short():
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", README.read_text(encoding="utf-8"))
    assert len([word for word in text.split() if re.search(r"\w", word)]) <= MOST_WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for path, heading in links(page):
        assert path.exists(), path
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in titles}, heading


def test_every_page_of_docs_can_be_reached():
    """From README, from another page of docs/, or, for what a node's help page leaves out, from there."""
    start, known = [README], {README}
    while start:
        for path, _ in links(start.pop()):
            if path.suffix == ".md" and path not in known and (ROOT / "docs") in path.parents:
                known.add(path)
                start.append(path)
    of_nodes = {path.resolve() for path in ROOT.glob("docs/Retort*.md")}
    assert {path.resolve() for path in ROOT.glob("docs/*.md")} <= known | of_nodes


def test_moving_pictures_move_and_are_small():
    shown = [path for path, _ in links(README) if path.suffix == ".webp"]
    assert shown
    for path in shown:
        assert path.stat().st_size < 1_000_000, path
        with Image.open(path) as image:
            assert image.n_frames >= 8, path
