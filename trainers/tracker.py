"""What lives in memory while a network without numbers is run: bytes by phase, and floating-point operations.

A tensor on the meta device has a shape, a type and a storage of so many bytes, and no memory behind it (`weightless`).
The tracker sees every operation, remembers each new storage by a weak reference, and takes its bytes off again when the
storage dies, which is when a real one would be freed.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type

# CUDA's allocator hands out whole blocks of so many bytes.
BLOCK = 512
# Below so many bytes a tensor that is moved off the card is given numbers, since something may read them.
SMALL = 2**20
_aten = torch.ops.aten
# torch's counter knows the kernels of accelerators alone.
_FLASH = _aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward
_NUMBER, _MOVE, _FILL = _aten._local_scalar_dense, _aten._to_copy, _aten.copy_


def block_bytes(count: int) -> int:
    """Bytes that the allocator takes for so many."""
    return -(-count // BLOCK) * BLOCK


class _Shapes:
    """Results of operations on the meta device, looked up by what they were given: torch's own take a tenth of a
    millisecond each, since most of them are written in Python.
    """

    def __init__(self) -> None:
        self._kinds: dict[Any, str] = {}
        self._known: dict[Any, Any] = {}

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What `func` gives; tensors of the right shape and type where that is all there is to it."""
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _kind(func)
        if kind == "view":
            return func(*args, **kwargs)
        if (
            args
            and args[0].__class__ is Tensor
            and args[0].is_meta
            and (kind == "in place" or (kwargs and kwargs.get("out") is args[0]))
        ):
            return args[0]
        key = (func, _key(args), _key(tuple(kwargs.items())) if kwargs else None)
        try:
            made = self._known.get(key)
        except TypeError:  # an argument that cannot be looked up
            return func(*args, **kwargs)
        if made is None:
            out = func(*args, **kwargs)
            self._known[key] = _recipe(out)
            return out
        return func(*args, **kwargs) if made is _UNKNOWN else _made(made)


_UNKNOWN = object()


def _kind(func: Any) -> str:
    """ "fresh" where all that comes out is new, "in place" where the first argument is only given other numbers."""
    schema = func._schema
    if func is _aten._unsafe_view.default:  # whose schema does not say that it is one
        return "view"
    if not schema.is_mutable and all(part.alias_info is None for part in schema.returns):
        return "fresh"
    name = schema.name.partition("::")[2]
    pointwise = torch.Tag.pointwise in func.tags or name in ("copy_", "fill_", "zero_")
    return "in place" if name.endswith("_") and pointwise and not name.startswith("_foreach") else "view"


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.is_meta
    return tuple(map(_key, value)) if isinstance(value, tuple | list) else (type(value), value)


def _recipe(out: Any) -> Any:
    if isinstance(out, Tensor):
        return (out.shape, out.stride(), out.dtype) if out.is_meta else _UNKNOWN
    if isinstance(out, tuple | list):
        parts = [_recipe(part) for part in out]
        return _UNKNOWN if any(part is _UNKNOWN for part in parts) else (type(out), parts)
    return None if out is None else _UNKNOWN


def _made(recipe: Any) -> Any:
    if recipe is None:
        return None
    if len(recipe) == 2:
        return recipe[0](map(_made, recipe[1]))
    shape, stride, dtype = recipe
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


class Tracker(TorchDispatchMode):
    """Within it: `now` bytes alive on the card, `peaks` and `flops` by phase; all numbers read from it are 1.

    card: the kind of device that is counted. phase: the name under which things are counted from now on, see `enter`.
    """

    def __init__(self, card: str = "meta") -> None:
        super().__init__()
        self.card = card
        self.now = 0
        self.phase = "start"
        self.peaks: dict[str, int] = {}
        self.flops: defaultdict[str, int] = defaultdict(int)
        # Imported here, since ComfyUI's start must not wait for it.
        from torch.utils import flop_counter

        self._formulas = flop_counter
        self._live: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._shapes = _Shapes()

    def enter(self, phase: str) -> None:
        """Begin a phase, or come back to it."""
        self.phase = phase
        self.peaks[phase] = max(self.peaks.get(phase, 0), self.now)

    def reset(self) -> None:
        """Forget peaks and operations; what is alive stays counted."""
        self.peaks.clear()
        self.flops.clear()
        self.enter(self.phase)

    def hold(self, tensor: Tensor) -> int:
        """Count a tensor that was there before; its new bytes, 0 where its storage is known or not on the card."""
        if tensor.device.type != self.card:
            return 0
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return 0
        size = block_bytes(storage.nbytes())

        def gone(_: object, key: int = key) -> None:
            self.now -= self._live.pop(key)[0]

        self._live[key] = (size, weakref.ref(storage, gone))
        self.now += size
        if self.now > self.peaks.get(self.phase, 0):
            self.peaks[self.phase] = self.now
        return size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(map(is_traceable_wrapper_subclass_type, types)):
            # A quantised tensor takes the operation apart, and its parts come by here.
            return NotImplemented
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet is _NUMBER and args[0].is_meta:
            return 1.0 if args[0].is_floating_point() else 1
        if packet is _MOVE and args[0].is_meta and kwargs.get("device", args[0].device).type != "meta":
            return _moved(args[0], kwargs)
        if packet is _FILL and args[1].is_meta and not args[0].is_meta:
            return args[0]
        out = self._shapes.run(func, args, kwargs)
        if packet in self._formulas.flop_registry:
            self.flops[self.phase] += self._formulas.flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet is _FLASH:
            self.flops[self.phase] += self._formulas.sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape)
        elif packet is _FLASH_BACKWARD:
            self.flops[self.phase] += self._formulas.sdpa_backward_flop_count(*(part.shape for part in args[:4]))
        self._hold_all(out)
        return out

    def _hold_all(self, out: Any) -> None:
        if isinstance(out, Tensor):
            self.hold(out)
        elif isinstance(out, tuple | list):
            for part in out:
                self._hold_all(part)


def _moved(tensor: Tensor, kwargs: Any) -> Tensor:
    """What a tensor becomes off the card: ones where it is small, else memory that nobody touches."""
    dtype, device = kwargs.get("dtype") or tensor.dtype, kwargs["device"]
    size = tensor.numel() * dtype.itemsize
    if size <= SMALL:
        return torch.ones(tensor.shape, dtype=dtype, device=device)
    return torch.empty(tensor.shape, dtype=dtype, device=device)
