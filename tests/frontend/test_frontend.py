"""The page's logic, by node's own test runner; a page itself is driven in tests/integration."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_the_pages_logic():
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    found = sorted(map(str, HERE.glob("*.test.mjs")))
    done = subprocess.run([node, "--test", *found], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
