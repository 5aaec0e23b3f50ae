"""Freed memory of a large network's run on a processor goes back to the system."""

from __future__ import annotations

import sys

import pytest
import torch

from retort.trainers import host_memory

HERE = torch.device("cpu")


def held():
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


def left(weights):
    """Bytes that stay of 200 MB of which every other piece of 2 MB is freed, and then of all."""
    with host_memory.given_back(HERE, weights):
        before = held()
        pieces = [torch.ones(2**19) for _ in range(100)]
        del pieces[::2]
        half = held() - before
    del pieces
    return half


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_is_freed_between_other_things_leaves_the_process():
    if host_memory._glibc() is None:
        pytest.skip("another C library")
    # As a program that has freed something large: from now on glibc keeps pieces of up to 32 MB.
    del (large := [torch.ones(2**22)])[:]
    assert not large
    assert left(host_memory.LARGE) < 120 * 2**20


def test_small_networks_and_devices_are_left_alone(monkeypatch):
    def refused():
        raise AssertionError("asked for the C library")

    monkeypatch.setattr(host_memory, "_glibc", refused)
    for device, weights in ((HERE, host_memory.LARGE - 1), (torch.device("meta"), host_memory.LARGE)):
        with host_memory.given_back(device, weights):
            pass


def test_another_library_changes_nothing(monkeypatch):
    monkeypatch.setattr(host_memory, "_glibc", lambda: None)
    with host_memory.given_back(HERE, host_memory.LARGE):
        assert torch.ones(3).sum() == 3
