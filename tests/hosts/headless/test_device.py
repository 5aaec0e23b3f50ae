"""Where networks run, and in which precision."""

from __future__ import annotations

import pytest
import torch

from retort.files.errors import UsageError
from retort.hosts.headless import device


def test_a_named_device_is_taken_and_an_unknown_one_refused(monkeypatch):
    monkeypatch.delenv("RETORT_DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.device() == torch.device("cpu") and device.dtype(torch.float16) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.device() == torch.device("cuda") and device.dtype(torch.float16) == torch.float16
    monkeypatch.setenv("RETORT_DEVICE", "cpu")
    assert device.device() == torch.device("cpu") and device.dtype(torch.float16) == torch.float32
    monkeypatch.setenv("RETORT_DEVICE", "xpu:1")
    assert device.device() == torch.device("xpu", 1)
    monkeypatch.setenv("RETORT_DEVICE", "gpu")
    with pytest.raises(UsageError, match="RETORT_DEVICE=gpu is no device of this torch: use cpu, cuda"):
        device.device()
