"""The methods by name, as workflows and job files call them; each registers itself in its own file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ....sampling.settings import Settings
from .contract import Objective

# What a method is for, by which nodes offer it.
Group = Literal["distillation", "images", "reward", "preference", "restoration"]


@dataclass(frozen=True)
class Method:
    """A method's settings and maths; what it needs is said by its objective's class."""

    name: str
    config: type[Settings]
    objective: type[Objective]
    group: Group


METHODS: dict[str, Method] = {}


def register(method: Method) -> None:
    """Make a method known, after those before it. ValueError for a name that another one has."""
    if method.name in METHODS:
        raise ValueError(f"there is a method called {method.name!r} already: choose another name")
    METHODS[method.name] = method


def of_group(*groups: str) -> list[str]:
    """The methods of these groups, in the order in which nodes list them."""
    return [name for name, method in METHODS.items() if method.group in groups]


def needing(need: str) -> list[str]:
    """The methods whose objective needs this, in the same order."""
    return [name for name, method in METHODS.items() if need in method.objective.needs]
