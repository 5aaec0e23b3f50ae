"""The one kind of error that a user meets here: where it is, what was given, what to do instead."""

from __future__ import annotations


class UsageError(ValueError):
    """A mistake that the reader of the message can mend. Shown as it is, without a traceback; exit code 2."""


class NodeError(UsageError):
    """A mistake at one node: its id and title, the input, the value (left out when there is none) and the remedy."""

    NO_VALUE = object()

    def __init__(self, node, problem: str, *, input: str | None = None, value=NO_VALUE, remedy: str = ""):
        where = f'node {short(node.id)} "{short(node.title)}"'
        if node.title != node.class_type:
            where += f" ({short(node.class_type)})"
        if input is not None:
            where += f', input "{input}"'
        text = f"{where}: {problem}"
        if value is not NodeError.NO_VALUE:
            text += f" (got {short(repr(value))})"
        super().__init__(". ".join(part.rstrip(".") for part in (text, remedy) if part) + ".")


def short(text: str) -> str:
    """A text that a file may have made as long as it likes."""
    return text if len(text) <= 80 else f"{text[:60]}...{text[-16:]}"
