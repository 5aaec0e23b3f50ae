"""Drives one page of ComfyUI for test_page.py, in a Python that has playwright.

python page_driver.py URL PICTURES: reads a JSON line {"do": METHOD, ...} at a time, answers with {"value": ...}
or {"error": ...}, and leaves screenshots in a folder.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

SET = "async (all) => { for (const [k, v] of Object.entries(all)) await app.extensionManager.setting.set(k, v); }"
# What is on the page that is ours.
ROOTS = ".retort-run, .retort-panel, .retort-picker, .retort-compare, .retort-lightbox, .retort-window, .retort-toast"
# As the template browser opens one: its thumbnail, its file, its place among the templates.
TEMPLATE = """async ({ name, vue }) => {
  const at = `/api/workflow_templates/retort/${name}`;
  const picture = new Image();
  picture.src = `${at}.jpg`;
  await picture.decode();
  const file = await (await fetch(`${at}.json`, { cache: "no-store" })).json();
  await app.loadGraphData(structuredClone(file), true, true, name, { openSource: "template" });
  const quiet = () => document.querySelectorAll("[data-node-id]").length >= app.graph._nodes.length;
  for (let i = 0; i < 50 && vue && !quiet(); i++) await new Promise((done) => setTimeout(done, 100));
  await new Promise((done) => setTimeout(done, 350));
  const { scale, offset } = app.canvas.ds;
  return { picture: picture.naturalWidth, file, view: [scale, ...offset] };
}"""
NODES = """(vue) => app.graph._nodes.map((node) => {
  const shown = vue ? document.querySelector(`[data-node-id="${node.id}"]`) : null;
  const fields = [...(shown?.querySelectorAll("[data-testid=node-widget]") ?? [])];
  const box = shown?.getBoundingClientRect();
  // What happens to a seed after a run stands in the seed's own row.
  const control = (widget) => String(widget.options?.values).startsWith("fixed,increment,decrement");
  // Nodes 2.0 draws buttons, ours and core's, apart from fields.
  const seen = (widget) => !control(widget) && widget.type !== "button" && !widget.hidden && !widget.options?.hidden
    && !((widget.advanced || widget.options?.advanced) && !node.showAdvanced);
  const scale = app.canvas.ds.scale;
  return {
    id: node.id, type: node.type, known: node.type in LiteGraph.registered_node_types,
    values: node.serialize().widgets_values ?? [],
    names: (node.widgets ?? []).filter(seen).map((widget) => widget.name),
    shown: shown ? { fields: fields.length, text: shown.textContent } : null,
    box: (shown ? [box.left, box.top, box.right, box.bottom] : [...node.getBounding()].map((x, i, all) =>
      scale * (i < 2 ? x : x + all[i - 2]))).map((x) => x / scale),
  };
})"""
# Names as assistive technology makes them, in short: label, text, alternative text, title.
UNNAMED = """(roots) => [...document.querySelectorAll(roots)].flatMap((root) => [root, ...root.querySelectorAll(
  "button, a, input, select, textarea, canvas, progress, img, [tabindex], [role]")])
  .filter((one) => one.getClientRects().length && !one.closest("[aria-hidden=true]"))
  .filter((one) => one.matches("button, a, input, select, textarea, canvas, progress, img, [role=tablist],"
    + "[role=application], [tabindex]:not([tabindex='-1'])"))
  .filter((one) => {
    const labelled = one.getAttribute("aria-labelledby");
    const text = [one.getAttribute("aria-label"), labelled && document.getElementById(labelled)?.textContent,
      one.textContent, one.title, [...(one.labels ?? [])].map((label) => label.textContent).join(" "),
      one.querySelector("img")?.alt].join("").trim();
    return one.tagName === "IMG" ? one.getAttribute("alt") === null : !text;
  }).map((one) => one.outerHTML.slice(0, 200))"""
CONTRAST = """(roots) => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const paint = (colour, below) => {
    pen.fillStyle = `rgb(${below.map(Math.round).join()})`;
    pen.fillRect(0, 0, 1, 1);
    pen.fillStyle = colour;
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => {
    const [r, g, b] = rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const canvasNode = paint(LiteGraph.NODE_DEFAULT_BGCOLOR, [0, 0, 0]);
  const under = (one) => {
    if (!one) return canvasNode;
    const colour = getComputedStyle(one).backgroundColor;
    return paint(colour, /^rgb\\(/.test(colour) ? [0, 0, 0] : under(one.parentElement));
  };
  // The page itself fades a muted node.
  const faded = (one, root) =>
    Number(getComputedStyle(one).opacity) * (one === root ? 1 : faded(one.parentElement, root));
  const poor = [];
  let count = 0;
  for (const root of document.querySelectorAll(roots)) {
    const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
      const one = walk.currentNode.parentElement;
      const text = walk.currentNode.textContent.trim();
      if (!text || !one.getClientRects().length || one.closest("[disabled], option")) continue;
      const back = under(one), share = faded(one, root);
      const fore = paint(getComputedStyle(one).color, back).map((v, i) => share * v + (1 - share) * back[i]);
      const [a, b] = [light(fore), light(back)].sort((x, y) => y - x);
      count++;
      const ratio = (a + 0.05) / (b + 0.05);
      if (ratio < 4.5) poor.push([text.slice(0, 40), one.className, ratio.toFixed(2)]);
    }
  }
  return { count, poor };
}"""
FOCUS = """(roots) => [...document.querySelectorAll(roots)].flatMap((root) => [root, ...root.querySelectorAll(
  "button, input, select, canvas, [tabindex]")])
  .filter((one) => one.tabIndex >= 0 && !one.disabled && one.getClientRects().length)
  // What lies behind a dialog takes no focus.
  .filter((one) => one.closest("dialog") || !document.querySelector("dialog[open]"))
  .map((one) => {
    one.focus({ focusVisible: true, preventScroll: true });
    const style = getComputedStyle(one);
    const ring = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) > 0;
    return document.activeElement === one && (ring || style.boxShadow !== "none") ? "" : one.outerHTML.slice(0, 160);
  })"""
# Ours that came with the page, and what it weighs.
WEIGHT = """() => performance.getEntriesByType("resource")
  .filter((one) => /\\/extensions\\/retort\\/.*\\.(m?js|css)$/.test(one.name))
  .map((one) => [new URL(one.name).pathname, one.decodedBodySize, one.startTime, one.responseEnd])"""


class Driver:
    """What test_page.py asks for, by name; everything that it gives is plain JSON."""

    def __init__(self, browser: Any, url: str, pictures: Path):
        self.page: Page = browser.new_page(viewport={"width": 1500, "height": 1100})
        # `weight` reads every file that was asked for; browsers remember 250.
        self.page.add_init_script("performance.setResourceTimingBufferSize(2000)")
        self.url, self.pictures = url, pictures
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._heard)
        self.page.on("dialog", lambda dialog: dialog.accept())
        # A first visit is shown templates, over everything, whenever they have been fetched.
        self.page.request.post(f"{url}/api/settings", data={"Comfy.TutorialCompleted": True})

    def _heard(self, message: Any) -> None:
        """An error that is not core's own: it asks for files that a user may have, and for sizes at the Hub."""
        text, where = message.text, message.location.get("url", "")
        core = ("accessed before initialization", "Content Security Policy", "Content Security Policy directive")
        if message.type != "error" or any(one in text for one in core):
            return
        if "Failed to load resource" in text and "retort" not in where:
            return
        self.errors.append(f"{text} ({where})")

    def open(self) -> None:
        """A fresh page, or the same one again."""
        self.page.goto(self.url)
        self.page.wait_for_function("window.app?.vueAppReady && app.graph && app.extensionManager", timeout=120_000)
        self.page.wait_for_selector(".side-bar-button, .side-tool-bar-container", timeout=60_000)
        time.sleep(1.5)

    def size(self, width: int, height: int) -> None:
        """The page's, in pixels."""
        self.page.set_viewport_size({"width": width, "height": height})
        time.sleep(0.3)

    def saved(self, where: str, text: str) -> list[Any]:
        """Press a button that gives a file: its name, and its beginning."""
        with self.page.expect_download(timeout=20_000) as waited:
            self.page.locator(where, has_text=text).first.click()
        data = Path(waited.value.path()).read_bytes()
        return [waited.value.suggested_filename, data[:4000].decode("latin-1")]

    def look(self, vue: bool, theme: str) -> None:
        """Choose renderer and theme."""
        self.page.evaluate(SET, {"Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": theme})
        time.sleep(0.5)

    def template(self, name: str, vue: bool) -> dict[str, Any]:
        """Open a template as its browser does, and tell what is there."""
        self.errors.clear()
        found = self.page.evaluate(TEMPLATE, {"name": name, "vue": vue})
        overlay = self.page.locator("[data-testid=error-overlay-see-errors]")
        told = ""
        if overlay.count():
            overlay.first.click()
            time.sleep(0.8)
            told = self.page.evaluate("document.body.innerText")
        nodes = self.page.evaluate(NODES, vue)
        return {**found, "nodes": nodes, "errors": list(self.errors), "told": told}

    def fresh(self, types: list[str], unfolded: bool = False) -> dict[str, Any]:
        """New nodes side by side, and of each what it shows; stray: widgets that are drawn above the first row."""
        self.page.evaluate("app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
        time.sleep(0.5)
        self.page.evaluate(
            """({ types, unfolded }) => { let x = 0; for (const type of types) {
              const node = LiteGraph.createNode(type); node.pos = [x, 0]; x += 460; app.graph.add(node);
              if (unfolded) { node.showAdvanced = true; node.setSize(node.computeSize()); } }
              app.canvas.ds.scale = 0.3; app.canvas.ds.offset = [200, 200]; app.canvas.setDirty(true, true); }""",
            {"types": types, "unfolded": unfolded},
        )  # fmt: skip
        time.sleep(1.5)
        return self.page.evaluate(
            """(types) => Object.fromEntries(app.graph._nodes.map((node) => {
              const drawn = (one) => (node.isWidgetRowVisible ?? node.isWidgetVisible).call(node, one);
              const rows = node.widgets.filter(drawn), folded = node.widgets.filter((one) => one.options?.advanced);
              return [node.type, { height: node.size[1], needed: node.computeSize()[1], rows: rows.length,
                widgets: node.widgets.filter((one) => one.name !== "run view" || !one.hidden).length,
                folded: folded.length,
                stray: app.canvas.constructor.vueNodesMode || LiteGraph.vueNodesMode ? []
                  : rows.filter((one) => !(one.y > 0)).map((one) => one.name) }]; }))""", types,
        )  # fmt: skip

    def lora(self, run: dict[str, Any], vue: bool) -> list[dict[str, Any]]:
        """Open a run's LoRA, and tell what nodes there are."""
        self.page.evaluate(
            """async (run) => { const page = await import("/extensions/retort/panel/new_workflow.mjs");
              await page.openLora(run); }""", run,
        )  # fmt: skip
        time.sleep(1.5)
        return self.page.evaluate(NODES, vue)

    def shot(self, name: str) -> None:
        """A screenshot."""
        self.page.screenshot(path=self.pictures / f"{name}.png")

    def fit(self, type: str) -> None:
        """Show a node at its natural size, its lower end where it is too large."""
        self.page.evaluate(
            """(type) => { const n = app.graph._nodes.find((one) => one.type === type), c = app.canvas;
              const top = Math.min(120, c.canvas.clientHeight - n.size[1] - 60);
              c.ds.scale = 1; c.ds.offset = [420 - n.pos[0], top - n.pos[1]]; c.setDirty(true, true); }""", type,
        )  # fmt: skip
        time.sleep(0.5)

    def change(self, type: str, values: dict[str, Any]) -> list[str]:
        """Set widgets of the nodes of a type; their names that were found."""
        return self.page.evaluate(
            """({ type, values }) => app.graph._nodes.filter((one) => one.type === type).flatMap((node) =>
              node.widgets.filter((one) => one.name in values).map((one) => { one.value = values[one.name];
                one.callback?.(one.value); return one.name; }))""", {"type": type, "values": values},
        )  # fmt: skip

    def queue(self, type: str) -> None:
        """Queue what a node needs and nothing else."""
        self.page.evaluate(
            """async (type) => { const node = app.graph._nodes.find((one) => one.type === type);
              await app.queuePrompt(0, 1, { queueNodeIds: [String(node.id)] }); }""", type,
        )  # fmt: skip

    def until(self, condition: str, seconds: float = 60) -> Any:
        """Wait for a JavaScript expression, and give its value."""
        return self.page.wait_for_function(condition, timeout=1000 * seconds, polling=200).json_value()

    def evaluate(self, code: str, given: Any = None) -> Any:
        """What an expression gives, or a function of `given`."""
        return self.page.evaluate(code, given)

    def click(self, where: str, text: str | None = None, keys: str | None = None) -> None:
        """Press a control by mouse, or by keys while it has the focus."""
        one = self.page.locator(where, has_text=text).first
        if keys is None:
            one.click(timeout=10_000)
        else:
            one.focus()
            self.page.keyboard.press(keys)

    def drag(self, where: str, begin: float, end: float) -> None:
        """Drag across an element, from one share of its width to another."""
        box = self.page.locator(where).first.bounding_box()
        across, height = (lambda share: box["x"] + share * box["width"]), box["y"] + box["height"] / 2
        self.page.mouse.move(across(begin), height)
        self.page.mouse.down()
        self.page.mouse.move(across(end), height, steps=5)
        self.page.mouse.up()

    def press(self, keys: str) -> None:
        """Keys, wherever the focus is."""
        self.page.keyboard.press(keys)

    def panel(self, section: str, keys: bool = False) -> None:
        """Open our sidebar at a section."""
        if not self.page.locator(".retort-panel").count():
            self.page.locator(".side-bar-button:has(.pi-chart-line)").first.click()
            self.page.wait_for_selector(".retort-panel")
        tab = self.page.locator(".retort-tabs [role=tab]", has_text=section)
        if keys:
            self.page.locator(".retort-tabs [aria-selected=true]").focus()
            for _ in range(3):
                if tab.get_attribute("aria-selected") == "true":
                    break
                self.page.keyboard.press("ArrowRight")
        else:
            tab.click()
        self.page.wait_for_function(
            "document.querySelector('.retort-body .retort-note')?.textContent.startsWith('looking') === false"
        )

    def leaf(self) -> bool:
        """Click the first finished latent that the pointer finds in the tree."""
        tree = self.page.locator(".retort-tree").first
        tree.scroll_into_view_if_needed()
        box = tree.bounding_box()
        for y in range(int(box["height"]) - 14, 0, -6):
            for x in range(30, int(box["width"]) - 6, 8):
                self.page.mouse.move(box["x"] + x, box["y"] + y)
                if self.page.evaluate("document.querySelector('.retort-tree').style.cursor") == "pointer":
                    self.page.mouse.click(box["x"] + x, box["y"] + y)
                    return True
        return False

    def audit(self) -> dict[str, Any]:
        """What has no name, no visible focus, or too little contrast, of all that is ours on the page now."""
        # The browser shows the focus where keys were used last.
        self.page.keyboard.press("Tab")
        return {
            "unnamed": self.page.evaluate(UNNAMED, ROOTS),
            "unseen": [one for one in self.page.evaluate(FOCUS, ROOTS) if one],
            **self.page.evaluate(CONTRAST, ROOTS),
        }

    def weight(self) -> list[Any]:
        """Path, bytes, begin and end (ms) of every file of ours that the page asked for."""
        return self.page.evaluate(WEIGHT)

    def heard(self) -> list[str]:
        """The page's errors since the last template."""
        return list(self.errors)


def main(url: str, pictures: Path) -> None:
    with sync_playwright() as playwright:
        installed = [p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
                     if Path(p).is_file()]  # fmt: skip
        chosen = {"executable_path": installed[0]} if installed else {}
        browser = playwright.chromium.launch(args=["--no-sandbox"], **chosen)
        driver = Driver(browser, url, pictures)
        for line in sys.stdin:
            wish = json.loads(line)
            try:
                answer = {"value": getattr(driver, wish.pop("do"))(**wish)}
            except Exception as error:
                driver.shot("error")
                answer = {"error": f"{type(error).__name__}: {error}"}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
