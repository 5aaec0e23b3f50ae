"""Records a picker and a training node on ComfyUI's page, for moving.py, in a Python that has playwright.

python moving_browser.py URL FOLDER WORKFLOW NAME..: leaves FOLDER/NAME_NUMBER_MILLISECONDS.png; imports nothing of
Retort.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

PICKS = 8
TRAINED = 180  # steps, of which the most copy the teacher's pictures
# A node at its natural size in the upper left corner, and where it is on the screen.
PLACE = """async (type) => {
  const node = app.graph._nodes.find((one) => one.type === type), canvas = app.canvas;
  for (const one of app.graph._nodes) if (one !== node) one.pos = [node.pos[0] + 3000, node.pos[1] + 3000];
  canvas.ds.scale = 1;
  canvas.ds.offset = [240 - node.pos[0], 150 - node.pos[1]];
  canvas.deselectAll?.();
  canvas.setDirty(true, true);
  await new Promise((done) => setTimeout(done, 600));
  const box = canvas.canvas.getBoundingClientRect();
  return { x: box.x + 240, y: box.y + 150 - 30, width: node.size[0], height: node.size[1] + 30 };
}"""
TRAINING = """async (steps) => {
  await app.extensionManager.command.execute("Comfy.NewBlankWorkflow");
  await new Promise((done) => setTimeout(done, 500));
  const add = (type, values = {}) => {
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    for (const one of node.widgets ?? []) {
      if (one.name in values) { one.value = values[one.name]; one.callback?.(one.value); }
    }
    return node;
  };
  const model = add("RetortEmbeddedModel", { variant: "flow" });
  const size = add("EmptySD3LatentImage", { width: 64, height: 64, batch_size: 1 });
  const drawn = ["blue seven", "red two", "green five", "purple nine"];
  const prompts = drawn.map((one) => `a bold ${one} on white paper`);
  const train = add("RetortTrainDistillation", { "method": "dmd2" });
  await new Promise((done) => setTimeout(done, 300));
  const values = {
    prompts: prompts.join("\\n"), name: "my student", steps, preview_every: 20, batch_size: 8, learning_rate: 0.001,
    ema: 0.95, warmup: 10, "method.steps": 1, "method.cfg": 2.5, "method.regression_steps": steps - 40,
    "method.pairs": 128, "method.pair_steps": 8,
  };
  for (const one of train.widgets) if (one.name in values) { one.value = values[one.name]; one.callback?.(one.value); }
  const link = (from, slot, name) => from.connect(slot, train, train.inputs.findIndex((one) => one.name === name));
  link(model, 0, "model"); link(model, 1, "clip"); link(model, 2, "vae"); link(size, 0, "latents");
  train.pos = [600, 0];
  train.setSize([420, 700]);
}"""


class Recorder:
    """Frames of one node, numbered."""

    def __init__(self, page: Page, folder: Path, name: str):
        self.page, self.folder, self.name, self.count = page, folder, name, 0
        self.box: dict[str, float] = {}

    def frame(self, milliseconds: int) -> None:
        """The node as it is now, to be shown so long."""
        path = self.folder / f"{self.name}_{self.count:04}_{milliseconds}.png"
        self.page.screenshot(path=path, clip=self.box)
        self.count += 1


def picker(page: Page, recorder: Recorder, workflow: dict[str, Any]) -> None:
    """Candidates are drawn ahead, then chosen by key, one pair after another."""
    page.evaluate("(given) => app.loadGraphData(given)", workflow)
    time.sleep(2)
    recorder.box = page.evaluate(PLACE, "RetortPreferencePicker")
    page.locator(".retort-picker").first.click(position={"x": 200, "y": 20})
    page.keyboard.press("d")
    wait = "document.querySelectorAll('.retort-picker-cell img').length >= 2"
    page.wait_for_function(wait, timeout=240_000)
    time.sleep(20)  # a few pairs ahead
    recorder.frame(1200)
    for number in range(PICKS):
        shown = page.evaluate("document.querySelector('.retort-picker-cell img').src")
        cell = page.locator(".retort-picker-cell").nth(number % 2)
        cell.hover()
        recorder.frame(500)
        page.locator(".retort-picker").first.focus()
        page.keyboard.press("1" if number % 2 == 0 else "2")
        page.wait_for_function(
            """(shown) => { const one = document.querySelector('.retort-picker-cell img');
              return one?.complete && one.src !== shown; }""",
            arg=shown, timeout=240_000,
        )  # fmt: skip
        page.mouse.move(5, 400)
        time.sleep(0.4)
        recorder.frame(700)


def training(page: Page, recorder: Recorder, _: dict[str, Any]) -> None:
    """A one-step student of the embedded model learns; the node's live view shows line, curve and previews."""
    page.evaluate(TRAINING, TRAINED)
    time.sleep(1)
    page.evaluate(PLACE, "RetortTrainDistillation")
    page.evaluate(
        """async () => { const node = app.graph._nodes.find((one) => one.type === "RetortTrainDistillation");
          await app.queuePrompt(0, 1, { queueNodeIds: [String(node.id)] }); }"""
    )
    page.wait_for_function("document.querySelectorAll('.retort-strip img').length >= 1", timeout=300_000)
    recorder.box = page.locator(".retort-run").first.bounding_box()
    seen = ""
    while recorder.count < 200:
        line = page.locator(".retort-line").first.inner_text()
        if line != seen:
            recorder.frame(250)
            seen = line
        if line.startswith(("finished", "failed")):
            break
        time.sleep(1)
    time.sleep(3)
    recorder.frame(2500)


def main(url: str, folder: Path, workflow: Path, names: list[str]) -> None:
    given = json.loads(workflow.read_text(encoding="utf-8"))
    with sync_playwright() as playwright:
        installed = [p for p in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(p).is_file()]
        chosen = {"executable_path": installed[0]} if installed else {}
        browser = playwright.chromium.launch(args=["--no-sandbox"], **chosen)
        page = browser.new_page(viewport={"width": 1366, "height": 1400})
        settings = {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": False}
        page.request.post(f"{url}/api/settings", data=settings)
        page.goto(url)
        page.wait_for_function("window.app?.vueAppReady && app.graph && app.extensionManager", timeout=120_000)
        time.sleep(2)
        for name in names:
            {"picker": picker, "training": training}[name](page, Recorder(page, folder, name), given)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
