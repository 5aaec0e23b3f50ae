"""A preset as JSON: the form of the files beside this one, of the user's own, and of the metadata of a LoRA.

An object with the fields of `Preset` by their names, but for the key, which is the file's name. `levels`, `timesteps`,
`unshifted` and `sigmas` are lists of lists, one per step count; `steps`, a list of step counts, stands for even
unshifted levels 1, (n - 1)/n .. 1/n. `refine` is {"levels": [..], "mode": ".."}. Whatever a stranger wrote is a Preset
or a ValueError that names the field.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from .preset import MOST_STEPS, Preset, Refine

_KEY = re.compile(r"[a-z0-9][a-z0-9_]{0,63}")
_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_MOST = 64  # entries of a list of names or patterns
_LONGEST = {"title": 80, "note": 1000, "source": 300, "files": 120}


class _Wrong(ValueError):
    """What a value has to be."""


def from_json(value: Any, key: str) -> Preset:
    """The preset that a parsed JSON object means. ValueError names the preset, the field and the remedy."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"Preset {key!r:.80}: a key has up to 64 of the characters a-z, 0-9 and _; rename the file")
    if not isinstance(value, Mapping):
        raise ValueError(f"Preset {key!r}: it is no object of fields; write {{\"title\": .., \"family\": .., ..}}")
    given: dict[str, Any] = {}
    for name, each in value.items():
        if name not in _READ:
            raise ValueError(f"Preset {key!r}: {name!r:.80} is no field; a preset has {', '.join(_READ)}")
        if each is None:
            continue
        try:
            given[name] = _READ[name](each)
        except _Wrong as wrong:
            raise ValueError(f"Preset {key!r}: {name} is {each!r:.80}; {wrong}") from wrong
    for name in ("title", "family"):
        if not given.get(name, "").strip():
            raise ValueError(f"Preset {key!r}: {name} is missing; a preset needs it")
    if "steps" in given:
        if "unshifted" in given:
            raise ValueError(f"Preset {key!r}: steps and unshifted exclude one another; leave one out")
        given["unshifted"] = tuple(_even(n) for n in given.pop("steps"))
    preset = Preset(key=key, **given)
    if not preset.step_counts:
        raise ValueError(f"Preset {key!r}: timesteps is missing; give timesteps, levels, unshifted, sigmas or steps")
    return preset


def to_json(preset: Preset) -> dict[str, Any]:
    """The object that `from_json` makes the same preset of, without its key and without what is as by default."""
    found: dict[str, Any] = {}
    for field in fields(Preset):
        value = vars(preset)[field.name]
        plain = field.default is not MISSING and value == field.default
        if field.name != "key" and not plain:
            found[field.name] = _written(value)
    if preset.paths == Preset("x", "x", preset.family).paths:
        del found["paths"]
    if preset.unshifted and all(grid == _even(len(grid)) for grid in preset.unshifted):
        del found["unshifted"]
        found["steps"] = list(preset.step_counts)
    return found


def _even(steps: int) -> tuple[float, ...]:
    return tuple(k / steps for k in range(steps, 0, -1))


def _written(value: Any) -> Any:
    if isinstance(value, Refine):
        return {"levels": list(value.levels)} | ({"mode": value.mode} if value.mode is not None else {})
    return [_written(each) for each in value] if isinstance(value, tuple) else value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**31:
        raise _Wrong("use a whole number")
    return value


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > 1e9 or not math.isfinite(value):
        raise _Wrong("use a number")
    return float(value)


def _text(longest: int) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or len(value) > longest or not value.isprintable():
            raise _Wrong(f"use one line of text of at most {longest} characters")
        return value

    return read


def _listed(each: Callable[[Any], Any], most: int = _MOST) -> Callable[[Any], tuple[Any, ...]]:
    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or not 0 < len(value) <= most:
            raise _Wrong(f"use a list of 1 to {most} entries")
        return tuple(each(one) for one in value)

    return read


def _count(value: Any) -> int:
    if not 1 <= _whole(value) <= MOST_STEPS:
        raise _Wrong(f"a step count is a whole number from 1 to {MOST_STEPS}")
    return int(value)


def _counts(value: Any) -> tuple[int, ...]:
    found = _listed(_count, MOST_STEPS)(value)
    if len(set(found)) < len(found):
        raise _Wrong("give each step count once")
    return found


def _class_name(value: Any) -> str:
    if not isinstance(value, str) or not _CLASS.fullmatch(value):
        raise _Wrong("use names of ComfyUI's model classes, such as ZImage")
    return value


def _pattern(value: Any) -> str:
    text = _text(_LONGEST["files"])(value)
    if not any(mark.isalnum() for mark in text) or "/" in text or "\\" in text:
        raise _Wrong("use names of files without folders, such as z_image_turbo*")
    return text


def _mu(value: Any) -> Any:
    if isinstance(value, list):
        return _listed(_number, 4)(value)
    return _text(8)(value) if isinstance(value, str) else _number(value)


def _refine(value: Any) -> Refine:
    if not isinstance(value, Mapping) or not {"levels"} <= set(value) <= {"levels", "mode"}:
        raise _Wrong("write an object with levels and, if you like, a mode")
    levels = _listed(_number, MOST_STEPS)(value["levels"])
    return Refine(levels, None if value.get("mode") is None else _text(32)(value["mode"]))  # type: ignore[arg-type]


_CHOICE = _text(32)
_LISTS_OF_LEVELS = _listed(_listed(_number, MOST_STEPS), MOST_STEPS)
_READ: dict[str, Callable[[Any], Any]] = {
    "title": _text(_LONGEST["title"]), "family": _CHOICE, "paths": _listed(_CHOICE),
    "timesteps": _listed(_listed(_whole, MOST_STEPS), MOST_STEPS),
    "levels": _LISTS_OF_LEVELS, "unshifted": _LISTS_OF_LEVELS, "sigmas": _LISTS_OF_LEVELS,
    "steps": _counts, "shift": _number, "mu": _mu, "audio_shift": _number,
    "mode": _CHOICE, "eta": _number, "label_scale": _number, "noise_scale": _number, "clip": _number,
    "start": _CHOICE, "refine": _refine, "boundary": _number, "frames_per_block": _whole,
    "cfg": _number, "guidance": _number, "lora_strength": _number,
    "latent_channels": _whole, "latent_dims": _whole,
    "architectures": _listed(_class_name), "files": _listed(_pattern),
    "note": _text(_LONGEST["note"]), "source": _text(_LONGEST["source"]), "certainty": _CHOICE,
}  # fmt: skip
