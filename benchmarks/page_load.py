"""What the plugin adds to the load of ComfyUI's page: time, pair by pair beside a server without it, and bytes.

`python -m retort.benchmarks.page_load [--quick] [--json FILE]` with COMFYUI_PATH, the folder of a checkout, in an
environment with its packages; Chromium is driven by playwright, here or in the Python that PLAYWRIGHT_PYTHON names.
A load begins at the navigation, in a browser without a cache, and ends when the first workflow is on the canvas.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from .comfyui import ROOT, Server
from .report import Figure, Report, arguments, finish
from .timing import ratio

MOST_MS, MOST_KB = 100.0, 150.0


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__).parse_args()
    checkout = os.environ.get("COMFYUI_PATH")
    if not checkout:
        raise SystemExit("set COMFYUI_PATH to the folder of a ComfyUI checkout")
    pairs = 9 if options.quick else 31
    browser = os.environ.get("PLAYWRIGHT_PYTHON", sys.executable)
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(Server(Path(checkout).resolve(), plugin=plugin)) for plugin in (True, False)]
        command = [browser, str(Path(__file__).with_name("page_browser.py")), *(one.url for one in servers), str(pairs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    ours, theirs = json.loads(done.stdout)
    report = Report("page_load")
    for which, name in enumerate(("page load", "main thread's processor time in it")):
        times = [[load[which] for load in loads] for loads in (ours, theirs)]
        more = ratio([a - b for a, b in zip(*times, strict=True)], [1.0] * pairs, 100)
        report.figures[f"{name}: with the plugin, minus without"] = replace(more, unit="ms", target=MOST_MS)
        report.figures[f"{name}: without the plugin"] = Figure(statistics.median(times[1]), "ms")
    for name, endings, target in (
        ("the script that comes with the page", (".js",), MOST_KB),
        ("modules and styles that come when they are needed", (".mjs", ".css"), None),
    ):
        files = (path for path in (ROOT / "extensions" / "comfyui").rglob("*") if path.suffix in endings)
        report.figures[name] = Figure(sum(path.stat().st_size for path in files) / 1000, "kB", target=target)
    finish(report, options)


if __name__ == "__main__":
    main()
