"""Loads two pages of ComfyUI by turns, for page_load.py, in a Python that has playwright; imports nothing of Retort.

python page_browser.py URL URL PAIRS: prints a JSON list of two lists of [milliseconds, of the main thread's processor].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

# The workflow comes after every extension has been set up.
LOADED = """const look = () => {
  if (window.app?.vueAppReady && window.app.graph?.nodes.length) window.loaded = performance.now();
  else setTimeout(look, 4);
};
look();"""


def load(browser: Any, url: str) -> list[float]:
    """Milliseconds of one load without a cache, and those that the page's main thread worked."""
    context = browser.new_context(viewport={"width": 1500, "height": 1000})
    page = context.new_page()
    tools = context.new_cdp_session(page)
    # Seconds of the thread, which do not count what else the machine does.
    tools.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.add_init_script(LOADED)
    page.goto(url)
    found = page.wait_for_function("window.loaded", timeout=120_000).json_value()
    worked = {one["name"]: one["value"] for one in tools.send("Performance.getMetrics")["metrics"]}["TaskDuration"]
    context.close()
    return [float(found), 1000 * worked]


def main(urls: list[str], pairs: int) -> None:
    """By turns, which goes first as well, after one load of each."""
    times: list[list[list[float]]] = [[], []]
    with sync_playwright() as playwright:
        installed = [p for p in ("/usr/bin/chromium", "/usr/bin/google-chrome") if Path(p).is_file()]
        chosen = {"executable_path": installed[0]} if installed else {}
        browser = playwright.chromium.launch(args=["--no-sandbox"], **chosen)
        context = browser.new_context()
        for url in urls:
            context.request.post(f"{url}/api/settings", data={"Comfy.TutorialCompleted": True})
        for number in range(pairs + 1):
            for which in (0, 1) if number % 2 else (1, 0):
                times[which].append(load(browser, urls[which]))
        browser.close()
    sys.stdout.write(json.dumps([one[1:] for one in times]) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:3], int(sys.argv[3]))
