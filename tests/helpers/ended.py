"""Runs that end in every way, and what of them is alive."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch


class Ending:
    """A watcher's `check`, which ends a run after its first step with `error`, None for not at all.

    Stands before the plugin's `Silent` among a class's bases.
    """

    def __init__(self, error: BaseException | None):
        self.error, self.checks = error, 0

    def check(self) -> None:
        """Raise the error from the second time on."""
        self.checks += 1
        if self.checks >= 2 and self.error is not None:
            raise self.error


def follow(monkeypatch: Any, trainer: Any) -> list[weakref.ref]:
    """Weak references, from now on, to all that a run of this Trainer class makes: base, adapters, players, outputs."""
    held: list[weakref.ref] = []
    made = trainer.prepare

    def prepared(self: Any) -> None:
        made(self)
        network = self.denoiser.network
        held.extend(map(weakref.ref, [network, *network.parameters(), self.denoiser, self, self.objective]))
        held.extend(weakref.ref(runner.optimiser) for runner in self.runners.values())
        for module in network.modules():
            module.register_forward_hook(
                lambda module, given, out: held.append(weakref.ref(out)) if isinstance(out, torch.Tensor) else None
            )

    monkeypatch.setattr(trainer, "prepare", prepared)
    return held


def forget(error: BaseException) -> None:
    """Let go of the frames that an error names, whose variables are the run's."""
    seen: BaseException | None = error
    while seen is not None:
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__


def alive(held: list[weakref.ref]) -> list[Any]:
    """What of it can still be reached."""
    gc.collect()
    return [kept() for kept in held if kept() is not None]


def changed(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that carry a hook, or a forward of their own."""
    return [
        module
        for module in network.modules()
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module)
    ]
