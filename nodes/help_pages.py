"""The tables of settings on the help pages: `python -m retort.nodes.help_pages` writes them from the declarations.

A table stands between `<!-- settings KEY -->` and `<!-- end -->`. KEY is one of `SHOWN` (settings that the page's node
offers itself), "options" (what each option of its choice offers), the name of a training method, or a group of those.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..restoration.degradation import RealWorld
from ..restoration.spectral import SpectralConfig
from ..sampling.find import FindConfig
from ..sampling.particles import SteeringConfig, ValueConfig
from ..sampling.reflection import ReflectionConfig
from ..sampling.settings import Setting, declared
from ..sampling.tree import TreeConfig
from ..trainers.adapters import LoraConfig
from ..trainers.config import TrainingConfig
from ..trainers.methods import METHODS, of_group
from . import NODES
from .inputs import CHOICE, inputs_of
from .restoration import SETTINGS as RESTORATION

PAGES = Path(__file__).resolve().parent.parent / "extensions" / "comfyui" / "docs"
BLOCK = re.compile(r"(<!-- settings (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
# What a page says of settings by their key.
SHOWN: dict[str, Mapping[str, Setting]] = {
    "run": {**declared(TrainingConfig), **declared(LoraConfig)},
    "find": declared(FindConfig),
    "reflection": declared(ReflectionConfig),
    "restoration": RESTORATION,
    "spectral": declared(SpectralConfig),
}
# The configs of all options of choices.
OPTIONS = {
    name: one for of in (TreeConfig, SteeringConfig, ValueConfig, RealWorld) for name, one in declared(of).items()
}


def table(inputs: Iterable[Any], settings: Mapping[str, Setting]) -> str:
    """A row for each input: its name, default, range or options, and what it means, its tooltip unless declared."""
    rows = ["| setting | default | range | meaning |", "|---|---|---|---|"]
    for one in inputs:
        said = settings.get(one.id)
        meaning = said and said.page or one.tooltip
        rows.append(f"| {one.id} | {_value(one.default)} | {_range(one)} | {meaning} |")
    return "\n".join(rows)


def method_table(name: str) -> str:
    """The settings of a method."""
    config = METHODS[name].config
    return table(inputs_of(config), declared(config))


def written(text: str, node: str) -> str:
    """A page's text with its tables as they are now. ValueError for a key that nothing has."""
    inputs: Iterable[Any] = next(each.GET_SCHEMA().inputs for each in NODES if each.__name__ == node)

    def block(found: re.Match[str]) -> str:
        key = found[2]
        if key in SHOWN:
            made = table((one for one in inputs if one.id in SHOWN[key]), SHOWN[key])
        elif key == "options":
            options = (option for one in inputs if one.get_io_type() == CHOICE for option in one.options)
            made = _titled({option.key: table(option.inputs, OPTIONS) for option in options if option.inputs})
        elif key in METHODS:
            made = method_table(key)
        elif methods := of_group(key):
            made = _titled({name: method_table(name) for name in methods})
        else:
            known = ", ".join([*SHOWN, "options"])
            raise ValueError(f"settings {key} on the page of {node}: it must be {known}, a method, or a group of them")
        return f"{found[1]}\n{made}\n\n{found[3]}"

    return BLOCK.sub(block, text)


def _titled(tables: Mapping[str, str]) -> str:
    return "\n\n".join(f"Settings of {name}:\n\n{made}" for name, made in tables.items())


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
