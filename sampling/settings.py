"""One declaration of a setting: from it come its check, a node's input, the row of a help page and the words of both.

A frozen dataclass that derives from `Settings` declares its fields with `setting`. What settings demand of one another
is the class's own `check`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, get_args, get_origin

_KEY = "setting"


@dataclass(frozen=True)
class Setting:
    """A setting as it was declared.

    low, high: the range of a number, both ends included. choices: of a text that is a Literal. step, round: of the
    number's widget. advanced: whether the widget is among those that are shown on demand. help: the tooltip; page: what
    a help page says in its place where there is more to say. remedy: the end of the message for a value out of range.
    """

    default: Any
    low: float | None = None
    high: float | None = None
    step: float | None = None
    round: float | None = None
    advanced: bool = False
    help: str = ""
    page: str = ""
    remedy: str = ""
    name: str = ""
    kind: type = object
    choices: tuple[str, ...] = ()

    def check(self, value: Any) -> None:
        """ValueError with name, value and remedy where the value is not among the choices, or not in the range."""
        remedy = f": {self.remedy}" if self.remedy else ""
        if self.choices and value not in self.choices:
            raise ValueError(f"{self.name} must be one of {', '.join(self.choices)}, got {value!r}{remedy}")
        if self.low is not None and self.high is not None and not self.low <= value <= self.high:
            low, high = _text(self.low), _text(self.high)
            raise ValueError(f"{self.name} must be between {low} and {high}, got {value!r}{remedy}")


def _text(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def setting(default: Any, low: float | None = None, high: float | None = None, **facts: Any) -> Any:
    """A field of a `Settings` class; facts: see `Setting`. The annotation says its type, and a Literal its choices."""
    return dataclasses.field(default=default, metadata={_KEY: Setting(default, low, high, **facts)})


def changed(of: type[Settings], name: str, **facts: Any) -> Any:
    """A setting of another class once more, with another default or whatever else is different here."""
    own_page = {"page": ""} if "help" in facts else {}
    made = dataclasses.replace(declared(of)[name], **own_page | facts)
    return dataclasses.field(default=made.default, metadata={_KEY: made})


class Settings:
    """Base of frozen dataclasses whose fields are settings. A value that is not allowed raises ValueError.

    shown: the settings that nodes offer, in the order of their inputs, which saved workflows count on: new ones go
    last. Empty: all of them, as they are declared.
    """

    shown: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name, one in declared(type(self)).items():
            one.check(getattr(self, name))
        self.check()

    def check(self) -> None:
        """What the settings demand of one another. ValueError names one of them, its value and a remedy."""


def declared(of: type) -> Mapping[str, Setting]:
    """The settings of a class by name."""
    return _declared(of)


@cache
def _declared(of: Any) -> Mapping[str, Setting]:
    hints = typing.get_type_hints(of)
    found = {}
    for each in dataclasses.fields(of):
        if _KEY in each.metadata:
            hint = hints[each.name]
            choices = get_args(hint) if get_origin(hint) is Literal else ()
            facts = {"name": each.name, "kind": str if choices else hint, "choices": choices}
            found[each.name] = dataclasses.replace(each.metadata[_KEY], **facts)
    return found


def offered(of: type[Settings]) -> list[Setting]:
    """The settings that nodes offer, in their order."""
    every = declared(of)
    return [every[name] for name in of.shown or every]
