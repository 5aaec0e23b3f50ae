"""Drives a page of ComfyUI as somebody who picks would; run by test_picker_page.py in a Python that has playwright.

python picker_page.py URL WORKFLOW PICTURES: prints a JSON object of what was seen, and leaves screenshots in a folder.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

# The picker's own, and not those of Blind Test, which looks the same.
OURS = ".retort-picker:not(.retort-blind)"
READY = f"""() => {{ const i = [...document.querySelectorAll('{OURS} .retort-picker-cell img')];
  return i.length > 0 && i.every((one) => one.naturalWidth > 0); }}"""
PICKER = "app.graph._nodes.find((n) => n.type === 'RetortPreferencePicker')"
PLACE = f"""(z) => {{ const c = app.canvas, n = {PICKER};
  c.ds.scale = z; c.ds.offset = [250 / z - n.pos[0], 110 / z - n.pos[1]]; c.setDirty(true, true); }}"""
QUIET = """async () => { const q = await (await fetch('/queue')).json();
  return q.queue_running.length + q.queue_pending.length === 0; }"""
SET = "async (all) => { for (const [k, v] of Object.entries(all)) await app.extensionManager.setting.set(k, v); }"


class Picking:
    """One tab, and everything that was chosen in it, as the set's file should tell."""

    def __init__(self, browser, url: str):
        self.page: Page = browser.new_page(viewport={"width": 1300, "height": 1000})
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.url = url

    def open(self, workflow: dict | None, **settings) -> None:
        self.page.goto(self.url)
        self.page.wait_for_function("window.app?.graph && app.extensionManager", timeout=120_000)
        time.sleep(2)
        self.page.evaluate(SET, settings)
        if workflow is not None:
            self.page.evaluate("async (d) => { await app.loadGraphData(d); }", workflow)
        self.page.wait_for_function(PICKER, timeout=30_000)
        self.page.keyboard.press("Escape")
        self.page.evaluate(PLACE, 1.0)
        self.page.wait_for_selector(f"{OURS} .retort-picker-counts", timeout=30_000)

    def text(self, part: str) -> str:
        return self.page.locator(f"{OURS} .retort-picker-{part}").inner_text()

    def until(self, what: str, *, judged: int | None = None, note: str | None = None) -> str:
        """Wait until so many are judged, or the note holds a text; the counts, or the note."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            counts, said = self.text("counts"), self.text("note")
            if judged is not None and counts.startswith(f"{judged} judged"):
                return counts
            if note is not None and note in said:
                return said
            time.sleep(0.1)
        raise AssertionError(f"{what}: {self.text('counts')!r}, {self.text('note')!r}")

    def shown(self) -> list[str]:
        """The candidates that can be chosen now."""
        self.page.wait_for_function(READY, timeout=60_000)
        time.sleep(0.35)  # a choice of what has just come is not taken
        sources = self.page.evaluate(
            f"[...document.querySelectorAll('{OURS} .retort-picker-cell img')].map((i) => i.src)"
        )
        return [source.rsplit("/", 1)[1] for source in sources]

    def choose(self, place: int, key: str | None = None) -> dict:
        """Choose by mouse, or by a key; winner and loser."""
        names = self.shown()
        if key is None:
            self.page.locator(f"{OURS} .retort-picker-cell").nth(place).click()
        else:
            self.page.keyboard.press(key)
        return {"winner": names[place], "loser": names[1 - place]}

    def quiet(self, seconds: float) -> None:
        """Wait until the server has nothing to run."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(QUIET):
            assert time.monotonic() < end, "the queue does not become empty"
            time.sleep(0.5)

    def press(self, text: str) -> None:
        self.page.locator(f"{OURS} .retort-picker-row button", has_text=text).click()


def picked(one: Picking, count: int, judged: int) -> list[dict]:
    """Choose so many, by turns by mouse, digit and arrow; every one is counted at once."""
    chosen = []
    ways = [(0, None), (1, "2"), (1, None), (0, "ArrowLeft"), (0, "1"), (1, "ArrowRight")]
    for number in range(count):
        chosen.append(one.choose(*ways[number % len(ways)]))
        one.until("a choice", judged=judged + number + 1)
    return chosen


def main(url: str, workflow: Path, pictures: Path) -> None:
    document, seen = json.loads(workflow.read_text(encoding="utf-8")), {}
    with sync_playwright() as playwright:
        installed = [p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
                     if Path(p).is_file()]  # fmt: skip
        chosen = {"executable_path": installed[0]} if installed else {}
        browser = playwright.chromium.launch(args=["--no-sandbox"], **chosen)
        one = Picking(browser, url)
        # A first visit is shown templates, over everything, whenever they have been fetched.
        one.page.request.post(f"{url}/api/settings", data={"Comfy.TutorialCompleted": True})
        one.open(document, **{"Comfy.VueNodes.Enabled": False, "Comfy.ColorPalette": "dark"})
        # A ticket with a hostile prompt was there before the page.
        one.shown()
        seen["hostile"] = one.text("prompt"), one.page.evaluate("[window.hurt ?? null, document.scripts.length]")[0]
        nodes = one.page.evaluate("app.graph._nodes.length")
        one.press("Generate")
        seen["chosen"] = picked(one, 9, 0)
        one.page.screenshot(path=pictures / "canvas_dark.png")
        # Taken back by key and chosen the other way round; the graph's own undo is not meant.
        one.page.keyboard.press("Control+z")
        one.until("undo", judged=8)
        back = seen["chosen"].pop()
        assert sorted(one.shown()) == sorted(back.values()), "what was taken back is not asked again first"
        seen["chosen"] += picked(one, 1, 8)
        one.shown()
        one.page.keyboard.press("s")
        seen["skipped"] = one.page.wait_for_function(
            f"document.querySelector('{OURS} .retort-picker-counts').textContent.includes('1 skipped')", timeout=10_000
        ).json_value()
        one.shown()
        one.page.keyboard.press("t")
        one.until("a tie", judged=10)
        seen["nodes"] = nodes, one.page.evaluate("app.graph._nodes.length")

        # Nothing can be sent, and the page is reloaded.
        one.page.route("**/answer?**", lambda route: route.abort())
        seen["chosen"].append(one.choose(0, "1"))
        seen["unsent"] = one.until("unsent", note="Not saved yet")
        seen["on_disk"] = one.page.evaluate(
            "async () => (await (await fetch('/retort/picker/bold_by_hand/tickets?by=pick')).json()).judged"
        )
        one.page.unroute("**/answer?**")
        # ComfyUI asks whether to leave a page with unsaved changes.
        one.page.on("dialog", lambda dialog: dialog.accept())
        one.open(document, **{"Comfy.VueNodes.Enabled": True, "Comfy.ColorPalette": "light"})
        one.until("after the reload", judged=11)
        seen["draws_after_reload"] = one.page.locator(f"{OURS} button[aria-pressed='true']", has_text="Stop").count()
        one.press("Generate")
        seen["chosen"] += picked(one, 9, 11)
        one.shown()
        one.page.screenshot(path=pictures / "nodes2_light.png")
        one.press("Stop")
        one.quiet(60)

        # A second tab that does not know what the first one says.
        two = Picking(browser, url)
        two.open(document)
        names = two.shown()
        assert one.shown() == names
        seen["chosen"].append(one.choose(0))
        one.until("the faster tab", judged=21)
        two.choose(1)
        seen["slower"] = two.until("the slower tab", note="faster")
        seen["slower_counts"] = two.until("the slower tab", judged=21)
        two.page.close()

        # A prompt that is refused ends the drawing.
        for _ in range(8):
            if one.text("counts").split(" · ")[1].startswith("0"):
                break
            one.shown()
            one.page.keyboard.press("s")
            time.sleep(0.4)
        one.page.evaluate("app.graph._nodes.find((n) => n.type === 'RetortPromptQueue').widgets[0].value = ''")
        one.press("Generate")
        seen["failed"] = one.until("a refused prompt", note="could not be queued")
        seen["draws_after_failure"] = one.page.locator(f"{OURS} button[aria-pressed='true']", has_text="Stop").count()
        one.page.screenshot(path=pictures / "failed.png")
        one.page.keyboard.press("Escape")

        # Train and compare: the muted group, with few steps.
        one.open(document)
        one.page.evaluate(
            """() => { for (const node of app.graph._nodes) { node.mode = 0;
              const few = { RetortTrainPreference: { steps: 4, warmup: 0, preview_every: 0 },
                RetortBlindTest: { prompts: 'a thin red two\\na bold blue one', per_prompt: 2 } }[node.type] ?? {};
              for (const [name, value] of Object.entries(few))
                node.widgets.find((widget) => widget.name === name).value = value; } }"""
        )
        one.page.evaluate("async () => { await app.queuePrompt(0); }")
        one.quiet(300)
        seen["history"] = one.page.evaluate(
            "async () => Object.values(await (await fetch('/history')).json()).at(-1).status.status_str"
        )
        # Closed while it draws.
        one.press("Generate")
        time.sleep(1)
        seen["errors"] = one.errors
        browser.close()
    sys.stdout.write(json.dumps(seen) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
