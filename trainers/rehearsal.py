"""One block of each kind is differentiated before the first step: what cannot be is found while nothing is spent.

The network runs once as a step would run it, but each of its blocks without a graph, and the first of every kind once
more with one. So it takes a pass and the memory of a single block. Found are:

    blocks that write to what autograd has kept         they compute without writes from then on (`writes`)
    operators without a backward pass                   Untrainable names operator and block
    no block that is called as a checkpoint sees it     Untrainable: checkpoints would do nothing
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpointing
from .entries import Around, renew, surround, uncover
from .memory import ran_out
from .writes import NoWrites, forbid

_OPERATOR = re.compile(r"backward through (\S+?)(?:\.default)? ")


def rehearse(network: nn.Module, call: Callable[[], Any]) -> None:
    """Rehearse one pass of a network, whose adapter is on. call: runs it, as a step does.

    Untrainable, in one sentence, for a network that cannot be trained as it is.
    """
    units = checkpointing.units(network)
    seen = _Seen(network)
    for _, module in units:
        surround(module, functools.partial(_Tried, module=module, seen=seen))
    try:
        with torch.enable_grad(), _kept() as outside:
            call()
        seen.written_outside = any(map(_changed, outside))
    except (RuntimeError, LookupError, TypeError, AttributeError, AssertionError) as error:
        if ran_out(error):
            raise
        raise Untrainable(
            f"model cannot be trained on these data: {type(network).__name__} does not take their first sample. Check "
            f"that the text encoder and the VAE are this model's own, as in its own workflow ({_line(error)})"
        ) from error
    finally:
        for _, module in units:
            uncover(module, _Tried)
    if units and not seen.called and checkpointing.enabled(network):
        raise Untrainable(
            f"gradient_checkpointing: {type(network).__name__} calls none of its {len(units)} blocks in a way that a "
            "checkpoint sees, so that it would save no memory: turn gradient_checkpointing off"
        )
    if not seen.writing and not seen.written_outside:
        return
    before = _numbers(call, graph=False)
    for module in network.modules():
        if type(module) in seen.writing or (module is network and seen.written_outside):
            forbid(module)
            renew(module)
    _compare(network, before, _numbers(call, graph=True))


class Untrainable(ValueError):
    """A network cannot be trained, or not on these data; the message says why in one sentence."""


class _Seen:
    """What a rehearsal has found out: blocks that were called, and classes of blocks that write."""

    def __init__(self, network: nn.Module):
        self.network = type(network).__name__
        self.called: set[nn.Module] = set()
        self.tried: set[tuple[type[nn.Module], Any]] = set()
        self.writing: set[type[nn.Module]] = set()
        self.written_outside = False


class _Tried(Around):
    """An entry of a block in a rehearsal: without a graph, and with one where its kind is new."""

    def __init__(self, forward: Callable[..., Any], inside: list[bool], module: nn.Module, seen: _Seen):
        super().__init__(forward, inside)
        self._module, self._seen = module, seen

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """See the base."""
        seen, entry = self._seen, self.forward
        seen.called.add(self._module)
        with ExitStack() as stack:
            while isinstance(entry, Around):
                if isinstance(entry, checkpointing.Checkpointed):
                    stack.enter_context(entry.off())
                entry = entry.forward
            kind = type(self._module), entry.__name__
            if kind not in seen.tried:
                seen.tried.add(kind)
                self._differentiate(args, kwargs)
            with torch.no_grad():
                made = self.within(*_each(args, _copied), **_each(kwargs, _copied))
        learns = any(t.requires_grad for t in (*_tensors(args), *_tensors(kwargs), *self._module.parameters()))
        # Clones, which the network may write to as to what a block has computed.
        return _each(made, lambda t: t.detach().requires_grad_(learns and t.is_floating_point()).clone())

    def _differentiate(self, args: Any, kwargs: Any) -> None:
        kind = type(self._module)
        try:
            wrote = self._once(args, kwargs)
        except (RuntimeError, NotImplementedError) as error:
            if ran_out(error):
                raise
            if _OPERATOR.search(str(error)):
                raise self._refused(error) from error
            wrote = True
        if not wrote:
            return
        try:
            with NoWrites():
                wrote = self._once(args, kwargs)
        except (RuntimeError, NotImplementedError) as error:
            if ran_out(error):
                raise
            raise self._refused(error) from error
        if wrote:
            raise self._refused("it writes to what its gradient needs")
        self._seen.writing.add(kind)

    def _refused(self, error: BaseException | str) -> Untrainable:
        text = error if isinstance(error, str) else _line(error)
        operator = _OPERATOR.search(text)
        why = f"its operator {operator.group(1)} has no backward pass" if operator else text
        return Untrainable(
            f"model cannot be trained: no gradient passes {type(self._module).__name__} of {self._seen.network} "
            f"({why}); update ComfyUI and its packages, or train another model"
        )

    def _once(self, args: Any, kwargs: Any) -> bool:
        """Forwards and back; whether something was written to that had been kept."""
        wanted: list[Tensor] = [p for p in self._module.parameters() if p.requires_grad]

        def own(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return _copied(tensor)
            leaf = tensor.detach().clone().requires_grad_()
            wanted.append(leaf)
            return leaf.clone()  # a leaf itself cannot be written to

        with torch.enable_grad():
            with _kept() as kept:
                made = self.within(*_each(args, own), **_each(kwargs, own))
            wrote = any(map(_changed, kept))
            ends = [tensor for tensor in _tensors(made) if tensor.requires_grad]
            if ends and wanted:
                torch.autograd.grad(ends, wanted, [torch.ones_like(end) for end in ends], allow_unused=True)
        return wrote


@contextmanager
def _kept() -> Iterator[list[tuple[Tensor, int]]]:
    """What autograd keeps meanwhile, each with how often it had been written to."""
    found: list[tuple[Tensor, int]] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append((tensor.detach(), tensor._version))
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        yield found


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(".")


def _changed(kept: tuple[Tensor, int]) -> bool:
    return kept[0]._version != kept[1]


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A value with each tensor in its tuples, lists and dicts changed."""
    if type(value) in (Tensor, nn.Parameter):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_each(part, change) for part in value)
    if type(value) is dict:
        return {key: _each(part, change) for key, part in value.items()}
    return value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _each(value, keep)
    return found


def _numbers(call: Callable[[], Tensor], graph: bool) -> Tensor:
    """What a pass gives; graph: with gradients, as blocks that may not write ask for, of which nothing is kept."""
    with torch.set_grad_enabled(graph), torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda kept: kept):
        return call().detach()


def _compare(network: nn.Module, before: Tensor, after: Tensor) -> None:
    if not before.is_meta and not torch.equal(before, after):
        away = float((before - after).abs().max())
        raise Untrainable(
            f"model cannot be trained: {type(network).__name__} computes in place, and without that to other numbers "
            f"({away:.2g} away); train another model, and please report this one"
        )
