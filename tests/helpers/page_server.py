"""A ComfyUI server with the plugin and one browser on its page, which tests of the page share within a module.

Pictures are left in the folder that RETORT_SCREENSHOTS names.
"""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DRIVER = REPOSITORY / "tests" / "integration" / "page_driver.py"


@contextmanager
def serving(started, base, **packs):
    """A server of a folder with the plugin, and further packs of one file by their names."""
    (base / "models" / "loras").mkdir(parents=True)
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "retort").symlink_to(REPOSITORY)
    for name, text in packs.items():
        (base / "custom_nodes" / f"{name}.py").write_text(text, encoding="utf-8")
    running = started(base)
    try:
        running.wait()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def app(started, tmp_path_factory):
    """A server of this module's own, since it is stopped and started again."""
    with serving(started, tmp_path_factory.mktemp("page")) as running:
        yield running


@pytest.fixture(scope="module")
def page(browser_python, app, tmp_path_factory):
    """page(method, ...): what page_driver.py says to it, in one browser for all tests."""
    pictures = Path(os.environ.get("RETORT_SCREENSHOTS", tmp_path_factory.mktemp("pictures")))
    pictures.mkdir(parents=True, exist_ok=True)
    command = [browser_python, str(DRIVER), app.url, str(pictures)]
    with open(pictures / "driver.txt", "w+", encoding="utf-8") as log:
        driver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)

        def ask(wish, **given):
            if driver.poll() is None:
                driver.stdin.write(json.dumps({"do": wish, **given}) + "\n")
                driver.stdin.flush()
            line = driver.stdout.readline()
            if not line:
                log.seek(0)
                said = log.read()
                if "Executable doesn't exist" in said:
                    pytest.skip("playwright finds no Chromium: `playwright install chromium`, or your system's package")
                pytest.fail(f"the browser ended: {said[-3000:]}")
            answer = json.loads(line)
            assert "error" not in answer, f"{wish} {given}: {answer['error']}"
            return answer["value"]

        ask.pictures = pictures
        try:
            ask("open")
            yield ask
        finally:
            driver.stdin.close()
            driver.wait(30)
