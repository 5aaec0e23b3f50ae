"""Tests on the second device: RETORT_SECOND_DEVICE=plain registers it in this process, see README.md."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# A device that is registered stays, and torch then takes it for the machine's accelerator.
if os.environ.get("RETORT_SECOND_DEVICE") == "plain":
    _spec = importlib.util.spec_from_file_location("second_device", Path(__file__).with_name("device.py"))
    _device = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
    _spec.loader.exec_module(_device)
    EXTENSION = _device.install()
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def second() -> Iterator[Any]:
    """The compiled device; fails the test that leaves a limit behind."""
    before = EXTENSION.limit()
    yield EXTENSION
    torch.accelerator.synchronize()
    assert EXTENSION.limit() == before


@pytest.fixture
def room():
    """with room(bytes): the device has so many bytes beside what is taken now."""

    @contextlib.contextmanager
    def limited(free: int) -> Iterator[None]:
        before = EXTENSION.limit()
        EXTENSION.set_limit(torch.accelerator.memory_allocated() + free)
        try:
            yield
        finally:
            EXTENSION.set_limit(before)

    return limited
