"""A streamed block's weights in host memory, and what stands in their places while they are away.

They stay where they lie, be that a file that is mapped or memory that another network shares. On the device they lie in
one flat buffer. They are moved as they are stored: a quantised one is the ordinary tensors that it consists of, put
together again by torch's own protocol for such classes (`__tensor_flatten__` and `__tensor_unflatten__`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

ALIGNMENT = 512  # bytes; as torch's own allocators, so that kernels see what they see when a weight stands alone
SMALL = 2**20  # bytes; smaller tensors of a block are gathered, since each copy to a device takes a while
Pin = Callable[[Tensor], bool]
Unpin = Callable[[Tensor], Any]


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
    return Plain(offset, tuple(weight.shape), stride, weight.dtype), _aligned(end)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _matched(plan: Plain | Composed, weight: Tensor) -> Iterator[tuple[Plain, Tensor]]:
    """The ordinary tensors of a weight, each with its place."""
    if isinstance(plan, Composed):
        apart = _taken_apart(weight)
        assert apart is not None
        for name, part in plan.parts.items():
            yield from _matched(part, apart[0][name])
    else:
        yield plan, weight


def _built(plan: Plain | Composed, parts: Iterator[Tensor]) -> Tensor:
    """A weight of its ordinary tensors, in the order of `_matched`."""
    if isinstance(plan, Plain):
        return next(parts)
    inner = {name: _built(part, parts) for name, part in plan.parts.items()}
    return plan.kind.__tensor_unflatten__(inner, plan.context, plan.shape, plan.stride)


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
    """The weights of one block in host memory; what stood in their places is `Away` from now on.

    Those that are on a device, and small ones, of which a copy costs nothing, lie in one buffer of its own. `size`:
    bytes of the flat buffer that holds all of them.
    """

    def __init__(self, weights: Sequence[Weight], pin: Pin | None = None, unpin: Unpin | None = None):
        self._unpin = unpin
        self._places: list[_Place] = []
        elsewhere: list[tuple[_Place, int, Tensor, int]] = []
        self.size = own = 0
        for weight in weights:
            tensor = weight.tensor.detach()
            plan, self.size = planned(tensor, self.size)
            place = _Place(weight, plan, Away.of(tensor, weight.name))
            if tensor.device.type == "cpu":
                place.before = weight.tensor  # type: ignore[assignment]
            for plain, part in _matched(plan, tensor):
                place.sources.append((plain, part))
                if part.device.type != "cpu" or part.nbytes < SMALL:
                    elsewhere.append((place, len(place.sources) - 1, part, own))
                    own += _aligned(part.nbytes)
            self._places.append(place)
        flat = torch.empty(own, dtype=torch.uint8)
        for place, number, part, offset in elsewhere:
            plain = place.sources[number][0]
            copy = replace(plain, offset=offset).view(flat)
            place.sources[number] = (plain, copy.copy_(part))
        self.put_away()
        copied = {id(place.sources[number][1]) for place, number, *_ in elsewhere}
        lying = [source for place in self._places for _, source in place.sources if id(source) not in copied]
        self._registered: list[Tensor] = []
        self.pinned = pin is not None and self._pin([flat, *lying], pin)

    def _pin(self, tensors: Sequence[Tensor], pin: Pin) -> bool:
        """Whether a device can fetch all of these by itself now; if not, none is pinned."""
        for tensor in tensors:
            if tensor.nbytes and not tensor.is_pinned():
                if not pin(tensor):
                    self._give_back()
                    return False
                self._registered.append(tensor)
        return True

    def _give_back(self) -> None:
        for tensor in self._registered:
            if self._unpin is not None:
                self._unpin(tensor)
        self._registered.clear()

    def put_away(self) -> None:
        """Let nobody see these weights."""
        for place in self._places:
            place.weight.put(place.away)

    def copy_to(self, flat: Tensor, non_blocking: bool = False) -> None:
        """Copy them to their places in a buffer of `size` bytes or more."""
        for place in self._places:
            for plain, source in place.sources:
                plain.view(flat).copy_(source, non_blocking=non_blocking)

    def put(self, flat: Tensor) -> None:
        """Let the network see these weights on a buffer that holds them."""
        for place in self._places:
            place.weight.put(nn.Parameter(place.plan.view(flat), requires_grad=False))

    def put_back(self) -> None:
        """Let the network see these weights in host memory, where they lie."""
        for place in self._places:
            made = place.before
            if made is None:
                sources = iter([source for _, source in place.sources])
                made = nn.Parameter(_built(place.plan, sources), requires_grad=False)
            place.weight.put(made)

    def let_go(self) -> None:
        """Give pinned memory back; the master is of no use afterwards."""
        self._give_back()
        self._places.clear()


@dataclass
class _Place:
    """A weight, where its parts go in a flat buffer, what stands in for it, and where the parts lie meanwhile."""

    weight: Weight
    plan: Plain | Composed
    away: Away
    sources: list[tuple[Plain, Tensor]] = field(default_factory=list)
    before: nn.Parameter | None = None  # what stood there, if that was in host memory


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
