"""What ComfyUI's own page makes of workflow files, for templates.py, in a Python that has playwright.

python templates_browser.py URL OUT FILES...: opens each on the canvas and writes the prompt that the page would queue
to OUT/NAME.json, or {"error": ...}. Imports nothing of Retort.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Error, sync_playwright

TOGETHER = 30
OPEN = """async (file) => {
  const quiet = { showMissingNodesDialog: false, showMissingModelsDialog: false };
  await app.loadGraphData(file, true, false, null, quiet);
  return (await app.graphToPrompt()).output;
}"""


def browser_of(playwright: Any) -> Any:
    """Chromium, the system's where there is one."""
    installed = [p for p in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(p).is_file()]
    chosen = {"executable_path": installed[0]} if installed else {}
    return playwright.chromium.launch(args=["--no-sandbox"], **chosen)


def main(url: str, out: Path, files: list[Path]) -> None:
    """Open all files, one after another, on one page."""
    with sync_playwright() as playwright:
        browser = browser_of(playwright)
        for at in range(0, len(files), TOGETHER):
            # A new page now and then: views of 3D scenes go on drawing behind what is opened later.
            context = browser.new_context(viewport={"width": 800, "height": 600})
            context.request.post(f"{url}/api/settings", data={"Comfy.TutorialCompleted": True})
            page = context.new_page()
            page.set_default_timeout(120_000)
            page.goto(url)
            page.wait_for_function("window.app?.vueAppReady && window.app.graph", timeout=120_000)
            page.evaluate("app.canvas.pause_rendering = true")
            for path in files[at : at + TOGETHER]:
                try:
                    said = page.evaluate(OPEN, json.loads(path.read_text(encoding="utf-8")))
                except Error as error:
                    said = {"error": str(error)}
                (out / path.name).write_text(json.dumps(said), encoding="utf-8")
            context.close()
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), list(map(Path, sys.argv[3:])))
