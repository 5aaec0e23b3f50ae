"""Which published student a MODEL is, by the names of the files that a prompt makes it of and by what LoRAs say.

The kind of the model alone names no student: its base has the same. It is told among what speaks for a preset, and
it chooses between presets whose files have one name.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..sampling.presets import Preset, PresetMismatch
from ..sampling.students.files import matching
from ..trainers import recipes
from .contract import MODEL, Host
from .prompted import Link, Source

ENDINGS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
_FURTHEST = 64  # nodes between a sampler and the model's loaders
_DEEPEST = 4  # values in values, as nodes with several LoRAs have them
_STRENGTHS = ("strength_model", "strength", "lora_strength")
_SHOWN = 6  # presets in a message


def files_of(link: Any) -> list[str]:
    """Names of the files of models and LoRAs behind a link to a MODEL, nearest first; those that act with strength 0 or
    are switched off are left out."""
    found: dict[str, None] = {}
    waiting = deque([link])
    for _ in range(_FURTHEST):
        if not waiting:
            break
        one = waiting.popleft()
        if not isinstance(one, Link):
            continue
        inputs = dict(one.inputs)
        if not _off(inputs):
            found |= dict.fromkeys(name for value in inputs.values() for name in _names(value))
        waiting.extend(value for name, value in inputs.items() if isinstance(value, Link) and "model" in name)
    return list(found)


def _names(value: Any, depth: int = 0) -> Iterator[str]:
    if isinstance(value, str):
        if value.lower().endswith(ENDINGS):
            yield value
    elif isinstance(value, Mapping | list) and depth < _DEEPEST and not (isinstance(value, Mapping) and _off(value)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _names(each, depth + 1)


def _off(inputs: Mapping[str, Any]) -> bool:
    return inputs.get("on") is False or any(inputs.get(name, 1) == 0 for name in _STRENGTHS)


def by_name(presets: Iterable[Preset], names: Sequence[str], kind: str = "") -> dict[str, tuple[Preset, str]]:
    """Presets whose published files have one of the names, by key, each with the file's name.

    kind: name of ComfyUI's class of the model, where it is known: of presets that one name fits it leaves those of its
    own, if there are any.
    """
    found: dict[str, tuple[Preset, str]] = {}
    every = list(presets)
    for name in names:
        fitting = matching(every, name)
        for preset in [one for one in fitting if kind in one.architectures] or fitting:
            found.setdefault(preset.key, (preset, name))
    return found


def student(
    presets: Iterable[Preset],
    names: Sequence[str],
    metadata: Callable[[str], Mapping[str, str] | None],
    kind: str,
    check: Callable[[Preset], None],
) -> tuple[Preset, str]:
    """The preset of a MODEL made of files of these names, and in words what speaks for it.

    metadata: of a LoRA by name, None for what is none. kind: see `by_name`. check: PresetMismatch where the model
    cannot be a preset's. ValueError, naming what could be chosen, where nothing speaks for a preset, where more than
    one may be meant, and for a recipe that cannot be read.
    """
    every = list(presets)
    said: dict[str, Preset] = {}
    for name in names:
        recipe = recipes.read(metadata(name) or {})
        if recipe is not None:
            said[name] = recipe.preset
    plain = [name for name in names if name not in said]
    named = by_name(every, plain, kind)
    meant = [*((preset, f"as {name} says") for name, preset in said.items())]
    meant += [(preset, _how(preset, name, kind)) for preset, name in named.values()]
    fitting = [pair for pair in meant if fits(check, pair[0])]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting and len(meant) == 1:
        check(meant[0][0])  # says why not
    if fitting:
        both = " or ".join(f"{preset.key} ({how})" for preset, how in fitting)
        raise PresetMismatch(f"preset 'auto' could be {both}: choose one")
    raise PresetMismatch(none_found(every, names, kind))


def has_recipe(host: Host, name: str) -> bool:
    """Whether a LoRA of the host's list says what student it is."""
    return recipes.KEY in host.lora_metadata(name)


def behind(prompt: Mapping[str, Any] | None, node: str | None, input: str) -> list[str]:
    """`files_of` an input of a node in a prompt; nothing where the prompt does not know the node."""
    if prompt is None or node is None or node not in prompt:
        return []
    return files_of(Source(prompt, node).get(input))


def of_model(
    host: Host, presets: Iterable[Preset], names: Sequence[str], model: MODEL, check: Callable[[Preset], None]
) -> Preset:
    """`student` of a host's MODEL; its title says what speaks for it."""
    loras = host.lora_names()
    preset, how = student(
        presets, names, lambda name: host.lora_metadata(name) if name in loras else None, host.model_kind(model), check
    )
    return replace(preset, title=f"{preset.title} (auto, {how})")


def none_found(presets: Iterable[Preset], names: Sequence[str], kind: str = "") -> str:
    """The sentence for names that no published student has."""
    of_kind = [preset.key for preset in presets if kind in preset.architectures]
    advice = f"; for {kind} there are {', '.join(of_kind[:_SHOWN])}" if of_kind else ""
    files = ", ".join(names[:_SHOWN]) or "no file"
    return (
        f"preset 'auto' finds no student by the files of the model ({files}), none of which carries a recipe or has a "
        f"published student's name: choose the preset{advice}"
    )


def fits(check: Callable[[Preset], None], preset: Preset) -> bool:
    """Whether a check lets a preset pass."""
    try:
        check(preset)
    except PresetMismatch:
        return False
    return True


def _how(preset: Preset, name: str, kind: str) -> str:
    if not kind or not preset.architectures:
        return f"by the name of {name}"
    if kind in preset.architectures:
        return f"by the name of {name} and the model's kind, {kind}"
    return f"by the name of {name} alone: it is published for {', '.join(preset.architectures)}, not {kind}"
