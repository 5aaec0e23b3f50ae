"""By which methods a network calls its blocks, and what is put around them for a while.

Nearly every block is called by `forward`. Some networks have several ways into one (Wan Animate 2: `forward_pose` and
`forward_gen`), which hooks of torch do not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_KNOWN: dict[type, tuple[str, ...]] = {}


def entries(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the methods by which a block of this class may be called: `forward`, and those named after it."""
    if kind not in _KNOWN:
        named = [name for name in dir(kind) if name.startswith("forward_") and callable(getattr(kind, name))]
        own = kind.forward is not nn.Module.forward
        _KNOWN[kind] = (*(("forward",) if own else ()), *sorted(named))
    return _KNOWN[kind]


class Around:
    """Something around an entry of a module; `forward` is what it was before.

    An entry that is called from within another one of its module is part of that, and runs as it is.
    """

    def __init__(self, forward: Callable[..., Any], inside: list[bool]):
        self.forward, self._inside = forward, inside

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """What is done instead."""
        raise NotImplementedError

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it the module's entries run as if this were not there."""
        before, self._inside[0] = self._inside[0], True
        try:
            yield
        finally:
            self._inside[0] = before

    def within(self, *args: Any, **kwargs: Any) -> Any:
        """The entry itself."""
        with self.off():
            return self.forward(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs) if self._inside[0] else self.call(*args, **kwargs)


def surround(module: nn.Module, make: Callable[[Callable[..., Any], list[bool]], Around]) -> None:
    """Put something around each entry of a module."""
    inside = [False]
    for name in entries(type(module)):
        setattr(module, name, make(getattr(module, name), inside))


def layers(module: nn.Module, name: str) -> Iterator[Around]:
    """What is around an entry of a module, from the outermost inwards."""
    around = vars(module).get(name)
    while isinstance(around, Around):
        yield around
        around = around.forward


def uncover(module: nn.Module, kind: type[Around]) -> None:
    """Take what is of this kind off each entry; what is around it stays."""
    for name in entries(type(module)):
        outer: Around | None = None
        for around in layers(module, name):
            if isinstance(around, kind):
                inner = around.forward
                if outer is not None:
                    outer.forward = inner
                elif getattr(inner, "__func__", None) is getattr(type(module), name):
                    delattr(module, name)
                else:
                    setattr(module, name, inner)
                break
            outer = around


def surrounded(module: nn.Module, kind: type[Around]) -> bool:
    """Whether something of this kind is around a module's entries."""
    return any(isinstance(around, kind) for name in entries(type(module)) for around in layers(module, name))


def renew(module: nn.Module) -> None:
    """Let what is around a module's entries call those of its class, which has been changed."""
    for name in entries(type(module)):
        for around in layers(module, name):
            if getattr(around.forward, "__self__", None) is module:
                around.forward = getattr(type(module), name).__get__(module)
