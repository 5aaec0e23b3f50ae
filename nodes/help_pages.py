"""Lists of settings and presets on help pages and in docs/: `python -m retort.nodes.help_pages` writes them.

A list stands between `<!-- settings KEY -->` and `<!-- end -->`. KEY is one of `SHOWN` (settings that the page's node
offers itself), "options" (what each option of its choice offers), "presets", the name of a training method, or a group
of those. docs/presets.md has a table of the presets between `<!-- presets -->` and `<!-- end -->`.
Lists and no tables: ComfyUI shows a help page in a column of 238 pixels.
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
from ..sampling.presets import PRESETS
from ..sampling.reflection import ReflectionConfig
from ..sampling.settings import Setting, declared
from ..sampling.tree import TreeConfig
from ..trainers.adapters import LoraConfig
from ..trainers.config import TrainingConfig
from ..trainers.methods import METHODS, of_group
from . import NODES
from .inputs import CHOICE, inputs_of
from .restoration import SETTINGS as RESTORATION

_ROOT = Path(__file__).resolve().parent.parent
PRESET_PAGE = _ROOT / "docs" / "presets.md"
HELP = _ROOT / "extensions" / "comfyui" / "docs"
DETAILS = _ROOT / "docs"
BLOCK = re.compile(r"(<!-- settings (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLE = re.compile(r"(<!-- presets -->\n).*?(<!-- end -->)", re.DOTALL)
BETWEEN = {
    "renoise": "fresh noise", "deterministic": "predicted noise", "single": "", "ancestral": "fresh noise in part",
    "tcd": "fresh noise in part",
}  # fmt: skip
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


def listed(inputs: Iterable[Any], settings: Mapping[str, Setting]) -> str:
    """A line for each input: name, default, range or other options, and its meaning: the tooltip unless declared."""
    lines = []
    for one in inputs:
        said = settings.get(one.id)
        meaning = said and said.page or one.tooltip
        lines.append(f"- **{one.id}** ({'; '.join(filter(None, (_value(one.default), _range(one))))}): {meaning}")
    return "\n".join(lines)


def method_list(name: str) -> str:
    """The settings of a method."""
    config = METHODS[name].config
    return listed(inputs_of(config), declared(config))


def preset_list() -> str:
    """Each preset and which file goes where."""
    return "\n".join(f"- **{key}** ({_escaped(one.title)}): {_escaped(one.note)}" for key, one in PRESETS.items())


def _escaped(text: str) -> str:
    return text.replace("*", r"\*")


def preset_table(text: str) -> str:
    """A page's text with its table of presets as they are now."""
    rows = ["| preset | student | calls | between steps |", "|---|---|---|---|"]
    for key, one in PRESETS.items():
        calls = ", ".join(map(str, one.step_counts)) or "any"
        rows.append(f"| `{key}` | {_escaped(one.title)} | {calls} | {BETWEEN[one.mode]} |")
    table = "\n".join(rows)
    return TABLE.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text)


def written(text: str, node: str) -> str:
    """A page's text with its lists as they are now. ValueError for a key that nothing has."""
    inputs: Iterable[Any] = next(each.GET_SCHEMA().inputs for each in NODES if each.__name__ == node)

    def block(found: re.Match[str]) -> str:
        key = found[2]
        if key in SHOWN:
            made = listed((one for one in inputs if one.id in SHOWN[key]), SHOWN[key])
        elif key == "options":
            options = (option for one in inputs if one.get_io_type() == CHOICE for option in one.options)
            made = _titled({option.key: listed(option.inputs, OPTIONS) for option in options if option.inputs})
        elif key == "presets":
            made = preset_list()
        elif key in METHODS:
            made = method_list(key)
        elif methods := of_group(key):
            made = _titled({name: method_list(name) for name in methods})
        else:
            known = ", ".join([*SHOWN, "options", "presets"])
            raise ValueError(f"settings {key} on the page of {node}: it must be {known}, a method, or a group of them")
        return f"{found[1]}\n{made}\n\n{found[3]}"

    return BLOCK.sub(block, text)


def _titled(lists: Mapping[str, str]) -> str:
    return "\n\n".join(f"Settings of {name}:\n\n{made}" for name, made in lists.items())


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.12g}" if isinstance(value, float) else _escaped(str(value)) or "empty"


def _range(one: Any) -> str:
    if options := getattr(one, "options", None):
        return "or " + ", ".join(option for option in options if option != one.default)
    if getattr(one, "max", None) is None:
        return ""
    return f"{_value(one.min)} to {_value(one.max)}"


def pages() -> list[Path]:
    """The English help pages, and those in docs/ that say more of a node."""
    return sorted([*HELP.glob("*.md"), *DETAILS.glob("Retort*.md")])


def main() -> None:
    """Write the lists of every page and the table of presets."""
    PRESET_PAGE.write_text(preset_table(PRESET_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for path in pages():
        text = path.read_text(encoding="utf-8")
        path.write_text(written(text, path.stem), encoding="utf-8")


if __name__ == "__main__":
    main()
