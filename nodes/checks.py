"""What nodes check before anything runs: their own demands on the inputs, as far as the prompt says what they are.

The same `check` serves when the node runs, with every value known, so that nothing is said in two ways.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from inspect import Signature, signature
from typing import Any

from ..hosts.api import Link, host, io, methods
from .inputs import CHOICE, completed

_EMPTY = re.compile("Empty.*Latent.*")
# Core's nodes that give as many pictures as come in at this input.
_SAME_BATCH = {
    "KSampler": "latent_image", "KSamplerAdvanced": "latent_image", "SamplerCustom": "latent_image",
    "SamplerCustomAdvanced": "latent_image", "VAEDecode": "samples", "VAEDecodeTiled": "samples",
}  # fmt: skip
_FURTHEST = 8  # nodes that are looked through


class Refused(ValueError):
    """What is wrong, with the input that it is about."""

    def __init__(self, input: str, sentence: str):
        super().__init__(sentence)
        self.input = input


class RefusedInput(ValueError):
    """The same for a host that knows errors by their text alone: it begins with the input's name and a colon."""


class Asked:
    """What a node is given, as far as that is known: all of it when the node runs; before, no value of a link.

    values: by the inputs' names, with defaults for those that were left out; a choice is {its name: option, and the
    option's inputs}. links: the inputs that are connected and not known, those of a choice with a dot.
    """

    def __init__(self, values: Mapping[str, Any], links: Mapping[str, Link] | None = None):
        self._values, self.links = values, links or {}

    def __getitem__(self, name: str) -> Any:
        return self._values.get(name)

    def knows(self, *names: str) -> bool:
        """Whether the values of these inputs are known, those of a choice's own inputs included."""
        return not any(link == name or link.startswith(f"{name}.") for link in self.links for name in names)

    def connected(self, name: str) -> bool:
        """Whether something is connected to an input that has no widget."""
        value = self[name]
        return name in self.links or not (value is None or (isinstance(value, list) and not value))


class CheckedNode(io.ComfyNode):
    """What all our nodes have in common: inputs may be left out, and what is wrong is said before anything runs."""

    def __init_subclass__(cls, **given: Any):
        super().__init_subclass__(**given)
        own = vars(cls).get("execute")
        # ComfyUI makes a copy of the class for every run.
        if isinstance(own, classmethod) and not hasattr(own.__func__, "__wrapped__"):
            cls.execute = classmethod(_with_defaults(own.__func__))  # type: ignore[method-assign, assignment]

    @classmethod
    def check(cls, given: Asked) -> None:
        """ValueError where the inputs cannot go together, or something is missing; what is not known is passed over."""

    @classmethod
    def validate_inputs(cls, *, captioner=None, kind=None, method=None, pair=None):
        """Whether a prompt can be run; see `Host.prompted`. ComfyUI names every choice here, without a value."""
        prompted = host.prompted()
        if prompted is None:
            return True
        inputs = cls.define_schema().inputs
        if _left_to_host(inputs, prompted):
            return True
        try:
            with about(*_names(inputs, prompted)):
                cls.check(asked(cls, prompted))
        except Refused as error:
            # Some messages begin with the input's name already.
            raise RefusedInput(f"{error.input}: {str(error).removeprefix(f'{error.input}: ')}") from error
        return True


def _with_defaults(execute: Callable[..., Any]) -> Callable[..., Any]:
    """`execute` with the node's defaults for inputs that a prompt left out and that it has no defaults for itself.

    One that takes all of its inputs by `**given` alone completes them itself.
    """
    of_all = list(signature(execute).parameters.values())[1:]
    named = {one.name: one.default for one in of_all if one.kind is one.POSITIONAL_OR_KEYWORD}
    more = bool(named) and any(one.kind is one.VAR_KEYWORD for one in of_all)

    @wraps(execute)
    def run(cls: type[io.ComfyNode], *args: Any, **given: Any) -> Any:
        there = {*given, *list(named)[: len(args)]} | {name for name in named if named[name] is not Signature.empty}
        if more or {*named} - there:
            for one in cls.define_schema().inputs:
                usual = None if one.get_io_type() == CHOICE else getattr(one, "default", None)
                if usual is not None and one.id not in there and (more or one.id in named):
                    given[one.id] = usual
        return execute(cls, *args, **given)

    return run


def asked(node: type[io.ComfyNode], prompted: Mapping[str, Any]) -> Asked:
    """What a prompt gives a node. ValueError for a choice that has no such option."""
    known = {name: value for name, value in prompted.items() if not isinstance(value, Link)}
    values: dict[str, Any] = {}
    for one in node.define_schema().inputs:
        if one.get_io_type() == CHOICE:
            within = f"{one.id}."
            inner = {name.removeprefix(within): known[name] for name in known if name.startswith(within)}
            values[one.id] = {one.id: known.get(one.id), **inner}
        elif one.id in known:
            values[one.id] = known[one.id]
    return Asked(completed(node, values), {name: value for name, value in prompted.items() if name not in known})


@contextmanager
def about(*names: str) -> Iterator[None]:
    """A ValueError from within is about the one of these inputs that its message names first, where it names one."""
    try:
        yield
    except Refused:
        raise
    except ValueError as error:
        sentence = str(error)
        places = {name: re.search(rf"(?<![\w.]){name.rpartition('.')[2]}(?!\w)", sentence) for name in names}
        found = {name: place.start() for name, place in places.items() if place}
        if not found:
            raise
        raise Refused(min(found, key=lambda name: found[name]), sentence) from error


@contextmanager
def at(name: str) -> Iterator[None]:
    """Whatever is refused within is about this input."""
    try:
        yield
    except ValueError as error:
        raise Refused(name, str(error)) from error


def check_range(given: Asked) -> None:
    """ValueError where what is guided would end before it begins."""
    if given.knows("start_percent", "end_percent"):
        methods.check_range(given["start_percent"], given["end_percent"])


def within(choice: str, inputs: Iterable[str]) -> tuple[str, ...]:
    """The names of a choice's inputs, and its own."""
    return (*(f"{choice}.{name}" for name in inputs if name != choice), choice)


def is_empty(link: Any) -> bool:
    """Whether a link is known to give an empty latent."""
    return isinstance(link, Link) and _EMPTY.fullmatch(link.kind) is not None


def batch_of(link: Any) -> int | None:
    """How many pictures or latents a link gives, where core's nodes between it and an empty latent tell; else None."""
    for _ in range(_FURTHEST):
        if not isinstance(link, Link):
            return None
        if _EMPTY.fullmatch(link.kind):
            count = link.inputs.get("batch_size")
            return count if isinstance(count, int) else None
        link = link.inputs.get(_SAME_BATCH.get(link.kind, ""))
    return None


def _live(inputs: Iterable[Any], prompted: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Inputs that a prompt can name, as it names them; of a choice those of the option that it chose."""
    for one in inputs:
        yield prefix + one.id, one
        if one.get_io_type() == CHOICE:
            for option in one.options:
                if option.key == prompted.get(prefix + one.id):
                    yield from _live(option.inputs, prompted, f"{prefix}{one.id}.")


def _names(inputs: Iterable[Any], prompted: Mapping[str, Any]) -> list[str]:
    return [name for name, _ in _live(inputs, prompted)]


def _left_to_host(inputs: Iterable[Any], prompted: Mapping[str, Any]) -> bool:
    """Whether the host itself says that something is missing, out of its range or not among the options."""
    for name, one in _live(inputs, prompted):
        value, kind = prompted.get(name), one.get_io_type()
        if name not in prompted:
            if not one.optional:
                return True
        elif isinstance(value, Link):
            if kind == CHOICE:  # and then nothing is known of its inputs
                return True
        elif kind in ("INT", "FLOAT"):
            if (one.min is not None and value < one.min) or (one.max is not None and value > one.max):
                return True
        elif kind == "COMBO" and value not in one.options:
            return True
    return False
