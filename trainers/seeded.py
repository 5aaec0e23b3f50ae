"""Torch's own generators, from which layers such as dropout draw, seeded for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within it the generators of the CPU and of a device begin at a seed; afterwards they go on where they were."""
    with ExitStack() as undone:
        undone.enter_context(torch.random.fork_rng(devices=[]))
        torch.default_generator.manual_seed(seed)
        if device.type == "mps":  # the one device of its kind, of which torch asks no number
            undone.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
            torch.mps.manual_seed(seed)
        elif device.type != "cpu":
            module = torch.get_device_module(device)
            undone.callback(module.set_rng_state, module.get_rng_state(device), device)
            with module.device(device):
                module.manual_seed(seed)
        yield
