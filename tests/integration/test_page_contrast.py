"""All that is ours on ComfyUI's page can be read in every theme that ComfyUI ships: contrast at least 4.5, computed.

Needs what test_page.py needs; COMFYUI_FRONTEND names another frontend. Pictures are left in RETORT_SCREENSHOTS.
"""

from __future__ import annotations

import importlib

import page_server
import pytest
import torch
from PIL import Image

pytest.importorskip("peft")
pytestmark = [pytest.mark.integration, pytest.mark.slow]
app, page = page_server.app, page_server.page
NODES = {"3 Teach it your taste": "RetortPreferencePicker", "Restore - Digits in one step": "RetortCompareImages"}
# What a palette of the frontend's own begins with, in its scripts.
PALETTE = r"""id:[`"']([a-z]+)[`"'],name:[`"'][^`"']+[`"'],(?:light_theme:[^,]+,)?colors:"""
SHIPPED = """async (palette) => {
  const scripts = performance.getEntriesByType("resource").map((one) => one.name).filter((one) => /\\.js$/.test(one));
  const texts = await Promise.all(scripts.map(async (one) => (await fetch(one)).text()));
  const found = texts.flatMap((text) => [...text.matchAll(new RegExp(palette, "g"))].map((one) => one[1]));
  return [...new Set(found)].sort();
}"""
THEMES = ["arc", "dark", "github", "light", "nord", "solarized"]
LATER = ["fennec", "skeleton", "spooky", "witch", "zombie"]  # of newer pages


@pytest.fixture(scope="module")
def filled(app):
    """Runs in every state, and a set of pairs."""
    preferences = importlib.import_module("retort.preferences.store")
    job_watch = importlib.import_module("retort.trainers.job_watch")
    runs, sets = (app.base / "output" / name for name in ("retort", "retort_preferences"))
    for state in ("finished", "failed", "stopped", "died"):
        (runs / state).mkdir(parents=True)
        text = f"a run that {state}"
        job_watch.write_status(runs / state, job_watch.Status(state, 3, 9, machine="another", message=text))
    lines = (f'{{"step": {i}, "student_loss": {1 / i:.4f}}}\n' for i in range(1, 9))
    (runs / "finished" / "metrics.jsonl").write_text("".join(lines))
    names = [preferences.keep_image(sets / "taste", torch.full((8, 8, 3), value)) for value in (0.2, 0.8)]
    row = {"prompt": "a red two", "winner": names[0], "loser": names[1], "by": "me", "strength": 1.0}
    preferences.append(sets / "taste", [row])
    cats = app.base / "input" / "cats"
    cats.mkdir(parents=True, exist_ok=True)
    for name, size in (("a", 64), ("b", 64), ("c", 64), ("tiny", 8)):
        Image.linear_gradient("L").rotate(90).resize((size, size)).save(cats / f"{name}.png")
    (cats / "a.txt").write_text("a grey cat")


def poor(page, what):
    found = page("audit")
    assert found["count"] > 0, what
    return [(what, *one) if isinstance(one, list) else (what, one) for one in found["poor"]]


@pytest.mark.parametrize("theme", [*THEMES, *LATER])
def test_every_text_can_be_read(page, filled, theme):
    page("open")
    if theme in LATER and theme not in page("evaluate", code=SHIPPED, given=PALETTE):
        pytest.skip("this page has no such theme")
    page("look", vue=False, theme=theme)
    found = []
    page("panel", section="Training")
    page("until", condition="document.querySelectorAll('.retort-list > li').length >= 4")
    page("click", where=".retort-title", text="finished", keys="Enter")
    page("until", condition="document.querySelector('.retort-panel .retort-run canvas')")
    found += poor(page, "runs")
    page("shot", name=f"contrast_runs_{theme}")
    page("panel", section="Preferences")
    page("click", where=".retort-title", text="taste", keys="Enter")
    page("until", condition="document.querySelector('.retort-pair img')?.naturalWidth")
    found += poor(page, "sets")
    page("shot", name=f"contrast_sets_{theme}")
    page("click", where="button", text="All pairs")
    page("until", condition="document.querySelector('.retort-data img')?.naturalWidth")
    found += poor(page, "pairs")
    page("click", where=".retort-data .retort-close")
    page("panel", section="Pictures")
    page("click", where=".retort-title", text="cats")
    page("until", condition="document.querySelector('.retort-data strong:not(:empty)')")
    found += poor(page, "pictures")
    page("shot", name=f"contrast_pictures_{theme}")
    page("click", where=".retort-data .retort-close")
    for vue in (False, True):
        page("look", vue=vue, theme=theme)
        for name, type in NODES.items():
            page("template", name=name, vue=vue)
            page("fit", type=type)
            found += poor(page, f"{type}, {'nodes2' if vue else 'canvas'}")
            page("shot", name=f"contrast_{type}_{'nodes2' if vue else 'canvas'}_{theme}")
    assert not found, found


def test_captions_are_written_and_wrong_pairs_taken_out(page, app, filled):
    page("open")
    page("look", vue=False, theme="dark")
    page("panel", section="Pictures")
    page("click", where=".retort-title", text="cats", keys="Enter")
    page("until", condition="document.querySelector('.retort-data').textContent.includes('much smaller')")
    told = page("evaluate", code="[...document.querySelectorAll('.retort-data strong')].map((one) => one.textContent)")
    alike, small = "looks like a.png; no caption", "much smaller than the others; no caption"
    assert told == ["", alike, alike, small]
    page("evaluate", code="""() => { const text = document.querySelectorAll(".retort-data textarea")[1];
      text.value = "another cat"; text.dispatchEvent(new Event("change")); }""")
    page("until", condition="document.querySelector('.retort-data').textContent.includes('saved')")
    written = app.base / "input" / "cats" / "b.txt"
    assert written.read_text() == "another cat"
    # Changed elsewhere meanwhile: what the file says is seen beside the box, and then replaced.
    written.write_text("theirs")
    for _ in range(2):
        assert written.read_text() == "theirs"
        page("evaluate", code="""() => { const text = document.querySelectorAll(".retort-data textarea")[1];
          text.value += "!"; text.dispatchEvent(new Event("change")); }""")
        shown = "document.querySelectorAll('.retort-data li')[1].innerText"
        page("until", condition=f"/file says: theirs|saved/.test({shown})")
    assert written.read_text() == "another cat!!"
    page("click", where=".retort-data label", text="only what is marked")
    page("until", condition="document.querySelectorAll('.retort-data li').length === 3")
    # A picture leaves the folder's pictures for another name, is seen among those that did, and comes back.
    page("click", where=".retort-data li:last-child button", text="Take out")
    page("until", condition="document.querySelector('.retort-data li:last-child').textContent.includes('Put back')")
    assert (app.base / "input" / "cats" / "tiny.png.taken_out").is_file()
    page("click", where=".retort-data label", text="what was taken out")
    page("until", condition="document.querySelectorAll('.retort-data li').length === 1")
    page("until", condition="document.querySelector('.retort-data img')?.naturalWidth === 8")
    page("shot", name="pictures_taken_out")
    page("click", where=".retort-data li button", text="Put back")
    page("until", condition="document.querySelector('.retort-data li').textContent.includes('Take out')")
    assert (app.base / "input" / "cats" / "tiny.png").is_file()
    page("press", keys="Escape")
    page("panel", section="Preferences")
    page("click", where="button", text="All pairs")
    lines = app.base / "output" / "retort_preferences" / "taste" / "pairs.jsonl"
    count = lines.read_text().count("\n")
    for said, then in (("Take out", "Put back"), ("Put back", "Take out")):
        page("click", where=".retort-data button", text=said)
        page("until", condition=f"document.querySelector('.retort-data li').textContent.includes('{then}')")
        count += 1
        assert lines.read_text().count("\n") == count
    page("press", keys="Escape")
    (told,) = page("heard")  # of the caption that had changed elsewhere
    assert "409 (Conflict)" in told and "cats/caption" in told


def test_these_are_all_the_themes(page):
    """A theme that a later ComfyUI brings is to be looked at too."""
    page("open")
    found = page("evaluate", code=SHIPPED, given=PALETTE)
    assert found in (THEMES, sorted(THEMES + LATER))
