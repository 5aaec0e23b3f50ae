"""Which student a MODEL or a LoRA is: by what LoRAs say themselves, and by the names of the files.

The kind of the model alone names no student: its base has the same. It is told among what speaks for a preset, and
it chooses between presets whose files have one name.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..sampling.presets import Preset, PresetMismatch
from ..sampling.students.files import matching
from ..trainers import recipes
from .contract import MODEL, Host
from .jobs import view
from .prompted import Link, Source

ENDINGS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
_FURTHEST = 64  # nodes between a sampler and the model's loaders
_DEEPEST = 4  # values in values, as nodes with several LoRAs have them
_STRENGTHS = ("strength_model", "strength", "lora_strength")
_SHOWN = 6  # presets in a message


def files_of(link: Any) -> list[str]:
    """Names of the files of models and LoRAs behind a link to a MODEL, nearest first; those that act with strength 0 or
    are switched off are left out."""
    return list(dict.fromkeys(name for inputs in _acting(link) for value in inputs.values() for name in _names(value)))


def runs_of(link: Any) -> list[str]:
    """Names of the runs whose LoRAs trainers of the same workflow put on the MODEL behind a link, nearest first."""
    trained = (inputs.get("lora") for inputs in _acting(link))
    given = (dict(one.inputs) for one in trained if isinstance(one, Link) and one.kind.startswith("Retort"))
    names = (inputs.get("run" if "run" in inputs else "name") for inputs in given)
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def file_of_run(host: Host, run: str) -> str | None:
    """The LoRA that a run has handed out, by its name in the host's list; None where it has none."""
    try:
        file = view.summary(view.run_folder(host.runs_folder(), run))["lora"]
    except (OSError, ValueError):
        return None
    return file if file in host.lora_names() else None


def _acting(link: Any) -> Iterator[dict[str, Any]]:
    """The inputs of the nodes behind a link to a MODEL, nearest first, without those that are switched off."""
    waiting = deque([link])
    for _ in range(_FURTHEST):
        if not waiting:
            break
        one = waiting.popleft()
        if not isinstance(one, Link):
            continue
        inputs = dict(one.inputs)
        if not _off(inputs):
            yield inputs
        waiting.extend(value for name, value in inputs.items() if isinstance(value, Link) and "model" in name)


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


@dataclass(frozen=True)
class Candidate:
    """A preset that files may be of a student of. how: what speaks for it, in words."""

    preset: Preset
    how: str


def candidates(
    presets: Iterable[Preset],
    names: Sequence[str],
    metadata: Callable[[str], Mapping[str, str] | None],
    kind: str = "",
) -> list[Candidate]:
    """What files of these names may be students of: first by the recipes that they carry, the others by their names.

    metadata: of a LoRA by name, None for what is none. kind: see `by_name`. ValueError for a recipe that cannot be
    read.
    """
    recipes_of = {name: recipes.read(metadata(name) or {}) for name in names}
    found = [
        Candidate(recipe.preset, f"as {name} says" + (f", taught by {recipe.method}" if recipe.method else ""))
        for name, recipe in recipes_of.items()
        if recipe is not None
    ]
    plain = [name for name, recipe in recipes_of.items() if recipe is None]
    named = by_name(presets, plain, kind).values()
    return found + [Candidate(preset, _how(preset, name, kind)) for preset, name in named]


def the_one(meant: Sequence[Candidate], check: Callable[[Preset], None], several: Callable[[str], str]) -> Candidate:
    """The one of some candidates that a model can be the student of.

    check: PresetMismatch where the model cannot be a preset's; where none fits it says why the first does not. several:
    the message for more than one, from their names.
    """
    fitting = [one for one in meant if fits(check, one.preset)]
    if not fitting:
        check(meant[0].preset)
    if len(fitting) > 1:
        raise PresetMismatch(several(" or ".join(f"{one.preset.key} ({one.how})" for one in fitting)))
    return fitting[0]


def student(
    presets: Iterable[Preset],
    names: Sequence[str],
    metadata: Callable[[str], Mapping[str, str] | None],
    kind: str,
    check: Callable[[Preset], None],
) -> Candidate:
    """The preset of a MODEL made of files of these names. Arguments and errors as of `candidates` and `the_one`.

    PresetMismatch, naming what could be chosen, where nothing speaks for a preset.
    """
    every = list(presets)
    meant = candidates(every, names, metadata, kind)
    if not meant:
        raise PresetMismatch(none_found(every, names, kind))
    return the_one(meant, check, lambda which: f"preset 'auto' could be {which}: choose one")


def lora_candidates(host: Host, presets: Iterable[Preset], name: str, kind: str = "") -> list[Candidate]:
    """`candidates` of a LoRA of the host's list alone. ValueError that names the input where there are none."""
    try:
        found = candidates(presets, [name], host.lora_metadata, kind)
    except ValueError as error:
        raise ValueError(f"lora_name: {name}: {error}") from error
    if not found:
        raise ValueError(
            f"lora_name: {name} carries no recipe of a student, and has no published student's name: load it with Load "
            "LoRA, and choose a preset in Distilled Setup"
        )
    return found


def of_lora(
    host: Host, presets: Iterable[Preset], name: str, kind: str, check: Callable[[Preset], None]
) -> Candidate:
    """How the student of a LoRA is sampled on a model of a kind. Errors as of `lora_candidates` and `the_one`."""
    return the_one(
        lora_candidates(host, presets, name, kind),
        check,
        lambda which: (
            f"lora_name: {name} may be the file of {which}: load it with Load LoRA, and choose one of these in "
            "Distilled Setup"
        ),
    )


def has_recipe(host: Host, name: str) -> bool:
    """Whether a LoRA of the host's list says what student it is."""
    return recipes.KEY in host.lora_metadata(name)


def another_training(chosen: str, key: str, file: str) -> str:
    """What to say where a preset is chosen and a file is the student of another."""
    return f"preset is {chosen}, and {file} is a student of another training: choose {key}, or auto"


def behind(host: Host, prompt: Mapping[str, Any] | None, node: str | None, input: str) -> list[str]:
    """`files_of` an input of a node in a prompt, those first that were trained in it; nothing where the prompt does not
    know the node."""
    if prompt is None or node is None or node not in prompt:
        return []
    link = Source(prompt, node).get(input)
    trained = (file_of_run(host, run) for run in runs_of(link))
    return list(dict.fromkeys([*(file for file in trained if file is not None), *files_of(link)]))


def of_model(
    host: Host, presets: Iterable[Preset], names: Sequence[str], model: MODEL, check: Callable[[Preset], None]
) -> Preset:
    """`student` of a host's MODEL; its title says what speaks for it."""
    loras = host.lora_names()
    found = student(
        presets, names, lambda name: host.lora_metadata(name) if name in loras else None, host.model_kind(model), check
    )
    return replace(found.preset, title=f"{found.preset.title} (auto, {found.how})")


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
