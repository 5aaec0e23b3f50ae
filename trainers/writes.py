"""Networks that write to tensors which autograd has kept: computed without such writes, to the same numbers.

Blocks are written for sampling: `x += attention(norm(x))` saves memory, and where adapters give x a gradient, the norm
has kept it for the backward pass. Without checkpoints torch then ends the run; within one nothing notices, since what
a checkpoint keeps when it computes its block again is not checked, and the gradient is silently another. Here a write
goes to a copy, which stands for the tensor from then on. `rehearsal` finds out which blocks need it; no other pays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .entries import entries

# x += y and the like, whose names do not end as those of methods that write do.
_OPERATORS = {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
} | {"__setitem__"}
# They change what a tensor is to autograd or how it is read, and no number.
_NO_WRITES = {
    "requires_grad_", "detach_", "share_memory_", "rename_", "squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_",
    "swapdims_", "as_strided_",
}  # fmt: skip


def _writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name in _OPERATORS or (name.endswith("_") and not name.endswith("__") and name not in _NO_WRITES)


def _plain(value: Any) -> bool:
    return type(value) in (Tensor, nn.Parameter)


def _whole(tensor: Tensor) -> Tensor:
    """What a view is of, or the tensor itself."""
    return tensor if tensor._base is None else tensor._base


def _same_place(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride() and a.storage_offset() == b.storage_offset()


class NoWrites(TorchFunctionMode):
    """Within it a write to a tensor that carries a gradient, or is given one, makes a copy and changes that.

    The copy takes the tensor's place in whatever comes later, views of it included, and in what `now` returns.
    """

    def __init__(self) -> None:
        super().__init__()
        self._copies: Any = WeakTensorKeyDictionary()  # a tensor with memory of its own -> what stands for it
        self._hook: Any = None

    def __enter__(self) -> NoWrites:
        # Layers are given tensors also where no function of torch is called by name (autograd's own Functions).
        self._hook = register_module_forward_pre_hook(lambda _, args: self.now(args))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hook.remove()

    def now(self, value: Any) -> Any:
        """A tensor, or those in tuples, lists and dicts, as they are after all writes."""
        if _plain(value):
            return self._now(value) if self._copies else value
        if type(value) in (tuple, list):
            return type(value)(self.now(part) for part in value)
        if type(value) is dict:
            return {key: self.now(part) for key, part in value.items()}
        return value

    def _now(self, tensor: Tensor) -> Tensor:
        while True:
            whole = _whole(tensor)
            copy = self._copies.get(whole)
            if copy is None:
                return tensor
            tensor = self._seen_in(copy, tensor, whole)

    @staticmethod
    def _seen_in(copy: Tensor, tensor: Tensor, whole: Tensor) -> Tensor:
        """The part of the copy that a tensor is of the whole."""
        if _same_place(tensor, whole):
            return copy
        return copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - whole.storage_offset())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._copies:
            args, kwargs = self.now(tuple(args)), self.now(dict(kwargs))
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if _plain(kwargs.get("out")):
            # Autograd takes no `out` at all.
            made = func(*args, **{key: value for key, value in kwargs.items() if key != "out"})
            self._copies[kwargs["out"]] = made
            return made
        if kwargs.get("inplace") is True and args and _plain(args[0]) and not args[0]._is_view():
            made = func(*args, **{**kwargs, "inplace": False})
            self._copies[args[0]] = made
            return made
        if _writes(func) and args and _plain(args[0]) and self._carries(args, kwargs):
            return self._written(func, args, kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _carries(args: Any, kwargs: Any) -> bool:
        if not args[0].is_floating_point():
            return False
        return any(isinstance(value, Tensor) and value.requires_grad for value in (*args, *kwargs.values()))

    def _written(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensor = args[0]
        whole = _whole(tensor)
        copy = whole.clone()
        if copy.stride() != whole.stride():
            return func(*args, **kwargs)  # memory with holes or overlaps: as it is written
        part = self._seen_in(copy, tensor, whole)
        made = func(part, *args[1:], **kwargs)
        self._copies[whole] = copy
        return made


def _without_writes(kind: type[nn.Module]) -> type[nn.Module]:
    def entry(name: str) -> Callable[..., Any]:
        original = getattr(kind, name)

        @functools.wraps(original)
        def called(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return original(self, *args, **kwargs)
            with NoWrites() as mode:
                made = original(self, *args, **kwargs)
            return mode.now(made)

        return called

    made = {name: entry(name) for name in entries(kind)}
    return type(kind.__name__, (kind,), {**made, "__module__": kind.__module__})


_MADE: dict[type, type[nn.Module]] = {}


def forbid(module: nn.Module) -> None:
    """Let a module compute without writes where gradients are on."""
    # A class and not an attribute: checkpoints and streaming replace `forward` on the instance, and put it back.
    kind = type(module)
    if kind in _MADE.values():
        return
    if kind not in _MADE:
        _MADE[kind] = _without_writes(kind)
    module.__class__ = _MADE[kind]
