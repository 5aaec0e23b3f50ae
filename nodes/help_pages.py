"""The tables of settings on the help pages: `python -m retort.nodes.help_pages` writes them from the declarations.

A table stands between `<!-- settings KEY -->` and `<!-- end -->`. KEY is "run" (how a run goes, as the page's node
offers it), the name of a method, or a group of methods, each with a table of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..sampling.settings import Setting, declared
from ..trainers.adapters import LoraConfig
from ..trainers.config import TrainingConfig
from ..trainers.methods import METHODS, of_group
from . import NODES
from .inputs import inputs_of

PAGES = Path(__file__).resolve().parent.parent / "extensions" / "comfyui" / "docs"
BLOCK = re.compile(r"(<!-- settings (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
RUN = {**declared(TrainingConfig), **declared(LoraConfig)}


def table(inputs: Iterable[Any], settings: dict[str, Setting]) -> str:
    """A row for each input: its name, default, range or options, and what it means."""
    rows = ["| setting | default | range | meaning |", "|---|---|---|---|"]
    for one in inputs:
        said = settings[one.id]
        rows.append(f"| {one.id} | {_value(one.default)} | {_range(one)} | {said.page or said.help} |")
    return "\n".join(rows)


def method_table(name: str) -> str:
    """The settings of a method."""
    config = METHODS[name].config
    return table(inputs_of(config), dict(declared(config)))


def written(text: str, node: str) -> str:
    """A page's text with its tables as they are now. ValueError for a key that nothing has."""

    def block(found: re.Match[str]) -> str:
        key = found[2]
        if key == "run":
            (inputs,) = (each.GET_SCHEMA().inputs for each in NODES if each.__name__ == node)
            made = table((one for one in inputs if one.id in RUN), RUN)
        elif key in METHODS:
            made = method_table(key)
        elif methods := of_group(key):
            made = "\n\n".join(f"Settings of {name}:\n\n{method_table(name)}" for name in methods)
        else:
            raise ValueError(f"settings {key} on the page of {node}: it must be run, a method or a group of methods")
        return f"{found[1]}\n{made}\n\n{found[3]}"

    return BLOCK.sub(block, text)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.12g}" if isinstance(value, float) else str(value).replace("*", r"\*")


def _range(one: Any) -> str:
    if options := getattr(one, "options", None):
        return ", ".join(options)
    if getattr(one, "max", None) is None:
        return "on, off" if isinstance(one.default, bool) else ""
    return f"{_value(one.min)} to {_value(one.max)}"


def main() -> None:
    """Write the tables of every page."""
    for path in PAGES.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        path.write_text(written(text, path.stem), encoding="utf-8")


if __name__ == "__main__":
    main()
