"""What a prompt says of a node before anything runs: values, and where the others come from.

A host that checks a prompt tells it here, for as long as it checks; `nodes.checks` asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

# The prompt that is being checked: its nodes by id, each {"class_type": ..., "inputs": {...}}.
PROMPT: ContextVar[Mapping[str, Any] | None] = ContextVar("retort prompt", default=None)
# The node that is looked at, where the host does not know it by other means.
NODE: ContextVar[str] = ContextVar("retort node", default="")


@dataclass(frozen=True)
class Link:
    """An input that is connected, so that its value is not known yet. kind: of the node that gives it."""

    kind: str
    inputs: Mapping[str, Any]


def inputs_of(node: str) -> dict[str, Any] | None:
    """What the prompt gives a node, by the inputs' names (a choice's with a dot): a value, or a `Link`.

    None where no prompt is being checked, or it has no such node.
    """
    prompt = PROMPT.get()
    if prompt is None or node not in prompt:
        return None
    return dict(Source(prompt, node))


class Source(Mapping[str, Any]):
    """The inputs of a node that others are connected to, looked up when they are asked for."""

    def __init__(self, prompt: Mapping[str, Any], node: str):
        self._prompt, self._inputs = prompt, prompt[node]["inputs"]

    def __getitem__(self, name: str) -> Any:
        return _value(self._prompt, self._inputs[name])

    def __iter__(self) -> Any:
        return iter(self._inputs)

    def __len__(self) -> int:
        return len(self._inputs)


def _value(prompt: Mapping[str, Any], value: Any) -> Any:
    linked = isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in prompt
    return Link(prompt[value[0]]["class_type"], Source(prompt, value[0])) if linked else value
