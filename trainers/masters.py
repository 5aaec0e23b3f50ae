"""A streamed block's weights while it is away: one flat buffer in host memory, and what stands in their places.

Weights are moved as they are stored: a quantised one is the plain tensors that it consists of, put together again by
torch's own protocol for such classes (`__tensor_flatten__` and `__tensor_unflatten__`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

ALIGNMENT = 512  # bytes; as torch's own allocators, so that kernels see what they see when a weight stands alone
Pin = Callable[[Tensor], bool]


class Away(nn.Parameter):
    """Stands where a weight belongs while it is in host memory. It knows its shape and dtype, and refuses all else.

    Without it a weight that is read at the wrong moment would be the numbers of another block.
    """

    weight_name: str

    @classmethod
    def of(cls, weight: Tensor, name: str) -> Away:
        """The place of a weight called `name`."""
        made = cls(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), requires_grad=False)
        made.weight_name = name
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _HARMLESS:
            return super().__torch_function__(func, types, args, kwargs or {})
        name = next(part.weight_name for part in tree_leaves((args, kwargs)) if isinstance(part, Away))
        raise RuntimeError(
            f"the weight {name} is streamed and lies in host memory just now: it is on the device only while its block "
            "computes"
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Away({self.weight_name}, {tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError(
            f"the weight {self.weight_name} is streamed: a network can be copied once its ring is closed"
        )


_PROPERTIES = (
    "shape", "dtype", "device", "ndim", "requires_grad", "grad", "grad_fn", "is_leaf", "layout", "itemsize", "nbytes",
    "is_meta", "is_cpu", "is_cuda", "is_quantized", "is_sparse",
)  # fmt: skip
_HARMLESS = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    *(getattr(Tensor, name).__set__ for name in ("requires_grad", "grad")),
    Tensor.requires_grad_, Tensor.numel, Tensor.dim, Tensor.size, Tensor.stride, Tensor.element_size,
    Tensor.is_floating_point, Tensor.is_complex,
}  # fmt: skip


@dataclass(frozen=True)
class Plain:
    """Shape, strides and dtype of an ordinary tensor, and where its bytes begin in a flat buffer."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def view(self, flat: Tensor) -> Tensor:
        """The tensor, on the buffer's memory."""
        count = _extent(self.shape, self.stride)
        part = flat[self.offset : self.offset + count * self.dtype.itemsize].view(self.dtype)
        return part.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Composed:
    """A tensor of a class of its own: what it consists of, and what puts it together."""

    kind: type[Any]
    parts: dict[str, Plain | Composed]
    context: Any
    shape: torch.Size
    stride: tuple[int, ...]

    def view(self, flat: Tensor) -> Tensor:
        """The tensor, on the buffer's memory."""
        inner = {name: part.view(flat) for name, part in self.parts.items()}
        return self.kind.__tensor_unflatten__(inner, self.context, self.shape, self.stride)


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Numbers from a tensor's first to its last, both included."""
    return 0 if 0 in shape else 1 + sum((side - 1) * step for side, step in zip(shape, stride, strict=True))


def _taken_apart(weight: Any) -> tuple[dict[str, Tensor], Any] | None:
    """What a tensor of a class of its own consists of, and what its class needs besides; None for ordinary ones."""
    if not hasattr(weight, "__tensor_flatten__"):
        return None
    names, context = weight.__tensor_flatten__()
    return {name: getattr(weight, name) for name in names}, context


def movable(weight: Tensor) -> bool:
    """Whether a weight can be moved as bytes: an ordinary tensor that is in memory, or one made of such."""
    if (apart := _taken_apart(weight)) is not None:
        return all(map(movable, apart[0].values()))
    return type(weight) in (Tensor, nn.Parameter) and weight.layout == torch.strided and not weight.is_meta


def size_of(weight: Tensor) -> int:
    """Bytes of a movable weight as it is stored, without alignment."""
    if (apart := _taken_apart(weight)) is not None:
        return sum(map(size_of, apart[0].values()))
    return weight.numel() * weight.dtype.itemsize


def planned(weight: Tensor, offset: int) -> tuple[Plain | Composed, int]:
    """Where a weight's parts go in a flat buffer from an offset on, and where the next may begin."""
    if (apart := _taken_apart(weight)) is not None:
        parts = {}
        for name, part in apart[0].items():
            parts[name], offset = planned(part, offset)
        return Composed(type(weight), parts, apart[1], weight.shape, weight.stride()), offset
    # Dense strides are kept (channels last computes otherwise); those of a slice or an expanded tensor are not.
    stride = torch.empty_like(weight, device="meta").stride()
    end = offset + _extent(weight.shape, stride) * weight.dtype.itemsize
    return Plain(offset, tuple(weight.shape), stride, weight.dtype), -(-end // ALIGNMENT) * ALIGNMENT


def fill(flat: Tensor, plan: Plain | Composed, weight: Tensor) -> None:
    """Copy a weight into its place in a flat buffer."""
    if isinstance(plan, Composed):
        apart = _taken_apart(weight)
        assert apart is not None
        for name, part in plan.parts.items():
            fill(flat, part, apart[0][name])
    else:
        plan.view(flat).copy_(weight)


Owner = tuple[nn.Module, str]


class Weight:
    """A weight of a block by its name in it, and where it stands: more than one place where it is tied."""

    def __init__(self, name: str, owners: Sequence[Owner]):
        self.name, self.owners = name, tuple(owners)

    @property
    def tensor(self) -> Tensor:
        """What stands there now."""
        module, key = self.owners[0]
        return getattr(module, key)

    def put(self, parameter: nn.Parameter) -> None:
        """Let the network see this in its place."""
        for module, key in self.owners:
            setattr(module, key, parameter)


class Master:
    """The weights of one block in one flat buffer of host memory; each is let go of as soon as it is copied there.

    Afterwards none of them is where it was, and what stands there refuses (`Away`).
    """

    def __init__(self, weights: Sequence[Weight], pin: Pin | None = None):
        plans, size = [], 0
        for weight in weights:
            plan, size = planned(weight.tensor.detach(), size)
            plans.append(plan)
        self.flat = torch.empty(size, dtype=torch.uint8)
        self._places: list[tuple[Weight, Plain | Composed, Away]] = []
        for weight, plan in zip(weights, plans, strict=True):
            fill(self.flat, plan, weight.tensor.detach())
            self._places.append((weight, plan, Away.of(weight.tensor, weight.name)))
            weight.put(self._places[-1][2])
        self.registered = bool(pin is not None and size and pin(self.flat))

    @property
    def pinned(self) -> bool:
        """Whether a device can fetch it by itself."""
        return self.registered or self.flat.is_pinned()

    def put_away(self) -> None:
        """Let nobody see these weights."""
        for weight, _, away in self._places:
            weight.put(away)

    def put(self, flat: Tensor) -> None:
        """Let the network see these weights on a buffer that holds what the flat one does."""
        for weight, plan, _ in self._places:
            weight.put(nn.Parameter(plan.view(flat), requires_grad=False))


def places(network: nn.Module) -> dict[int, list[tuple[str, Owner]]]:
    """Each parameter of a network by identity: all its names and owners."""
    found: dict[int, list[tuple[str, Owner]]] = {}
    for path, module in network.named_modules(remove_duplicate=False):  # one that stands in two blocks counts in both
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(id(parameter), []).append((f"{path}.{key}" if path else key, (module, key)))
    return found


def streamable(network: nn.Module, blocks: Sequence[nn.Module]) -> list[list[Weight]]:
    """For each block the frozen weights that can be streamed: no adapter's, and none that stands elsewhere, too."""
    owners = places(network)
    made = []
    for block in blocks:
        weights = []
        for identity, inside in places(block).items():
            module, key = inside[0][1]
            parameter = getattr(module, key)
            frozen = not parameter.requires_grad and not any("lora_" in name for name, _ in inside)
            if frozen and movable(parameter) and len(inside) == len(owners[identity]):
                weights.append(Weight(owners[identity][0][0], [owner for _, owner in inside]))
        made.append(weights)
    return made
