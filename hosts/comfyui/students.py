"""Warns of few-step students that a prompt samples otherwise than they were trained: guidance, sampler, steps, prompts.

And of a training of one that ends before it begins.

A student is known by the name of its published file or by its metadata, as for the preset "auto".
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import folder_paths
from safetensors import SafetensorError, safe_open

from ...sampling.presets import Preset
from ...sampling.students.files import is_base
from ...trainers import recipes
from ...trainers.methods import of_group
from ...trainers.recipes import Recipe
from .. import presets
from ..prompted import Link, Source
from ..recognise import another_training, by_name, files_of

# KSampler asks for a step more with these, and leaves the last level but one out.
_DROPPING = ("uni_pc", "uni_pc_bh2", "dpm_2", "dpm_2_ancestral")
# They extrapolate from step to step, which students that were trained with Euler steps do not take.
_EXTRAPOLATING = ("res_multistep", "res_multistep_cfg_pp", "dpmpp_2m", "dpmpp_2m_cfg_pp")
# How the prompts of the templates begin, of which the demo model can draw nothing else.
_DIGITS = re.compile(r"\s*an? (\w+ ){1,2}(zero|one|two|three|four|five|six|seven|eight|nine) on \w+ paper")
# Nodes that bring no student but by the name of a file.
_PLAIN = ("UNETLoader", "UnetLoaderGGUF", "CheckpointLoaderSimple", "LoraLoader", "LoraLoaderModelOnly")
_FURTHEST = 64  # nodes between a sampler and the model's loaders
_SETUP = "RetortDistilledSetup"
_REMEDY = "sample with Distilled Setup"
_LOADED = "connect GUIDER, SAMPLER and SIGMAS of Load Student to SamplerCustomAdvanced"
_log = logging.getLogger("retort")


def warnings(prompt: Mapping[str, Any], folders: Sequence[Path] = ()) -> list[str]:
    """A sentence for each thing that a prompt does to a student that it was not trained for.

    folders: of the user's presets.
    """
    nodes = {
        id: node
        for id, node in prompt.items()
        if isinstance(node, Mapping) and isinstance(node.get("inputs"), Mapping) and "class_type" in node
    }
    every, found = presets.known(folders).values(), list[str]()
    for id in nodes:
        inputs = dict(Source(nodes, id))
        found += _of_node(inputs, every)
        if nodes[id]["class_type"] == _SETUP:
            found += _of_setup(inputs, every)
        found += _of_training(inputs)
    return list(dict.fromkeys(found))


def _of_node(inputs: Mapping[str, Any], every: Iterable[Preset]) -> Iterator[str]:
    """What is wrong at a node that samples, or guides. every: the presets that there are."""
    guider, sampler = inputs.get("guider"), inputs.get("sampler")
    model, name = inputs.get("model"), inputs.get("sampler_name")
    dropping: tuple[str, ...] = _DROPPING
    if isinstance(guider, Link) and isinstance(sampler, Link):  # SamplerCustomAdvanced, whose levels are given
        model, name, dropping = guider.inputs.get("model"), sampler.inputs.get("sampler_name"), ()
    cfg, steps = inputs.get("cfg"), inputs.get("steps")
    denoise = inputs.get("denoise", 1)
    if not isinstance(denoise, int | float) or denoise < 1:
        steps = None  # of which as many are done as the levels below allow
    cfg = float(cfg) if isinstance(cfg, int | float) else None
    if not isinstance(model, Link) or not (cfg is not None or isinstance(name, str)):
        return
    files = files_of(model)
    students = by_name(every, files)
    preset, file = next(iter(students.values())) if len(students) == 1 else (None, "")
    trained = {file: recipe for file in files if (recipe := _trained(file)) is not None}
    remedy = _LOADED if any(link.kind == "RetortLoadStudent" for link in _chain(model)) else _REMEDY
    if cfg is not None and cfg > 1:
        known = [file] if preset is not None and preset.cfg == 1 else []
        for student in dict.fromkeys([*trained, *known]):
            yield (
                f"cfg is {cfg:g}, and {student} makes a few-step student, which has guidance built in: set cfg to 1, "
                f"or {remedy}"
            )
    own = [(file, recipe.preset) for file, recipe in trained.items() if isinstance(recipe, Recipe)]
    if preset is None and len(own) == 1 and isinstance(name, str) and isinstance(steps, int):
        student, its = own[0]
        if steps not in its.step_counts:
            yield _other_steps(steps, student, its, remedy)
    if preset is not None:
        yield from _of_student(preset, file, name, dropping, steps, remedy)
        if cfg == 1 and preset.cfg == 1 and (text := _text(inputs.get("negative"))):
            yield (
                f"the negative prompt {text!r:.40} is ignored: {file} makes a few-step student, which is sampled at "
                "cfg 1, without one"
            )


def _of_student(
    preset: Preset, file: str, name: Any, dropping: tuple[str, ...], steps: Any, remedy: str
) -> Iterator[str]:
    remedy = f"{remedy}, preset {preset.key}" if remedy == _REMEDY else remedy
    if name in dropping:
        yield (
            f"sampler_name is {name}, for which KSampler leaves out the last level but one that {file} was trained at: "
            f"choose euler, or {remedy}"
        )
    elif name in (*_DROPPING, *_EXTRAPOLATING):
        yield (
            f"sampler_name is {name}, which extrapolates from step to step, and {file} was trained with plain steps: "
            f"choose euler, or {remedy}"
        )
    if isinstance(name, str) and isinstance(steps, int) and steps not in preset.step_counts:
        yield _other_steps(steps, file, preset, remedy)


def _other_steps(steps: int, file: str, preset: Preset, remedy: str) -> str:
    known = ", ".join(map(str, sorted(preset.step_counts)))
    return (
        f"steps is {steps}, and {file} was trained for {known}: other numbers of steps ask it at levels that it never "
        f"saw; choose one of these, or {remedy}"
    )


def _of_setup(inputs: Mapping[str, Any], every: Iterable[Preset]) -> Iterator[str]:
    """What is wrong at Distilled Setup: the preset of another student than the file that is loaded."""
    model, chosen = inputs.get("model"), inputs.get("preset")
    if not isinstance(model, Link) or not isinstance(chosen, str):
        return
    files = files_of(model)
    known = by_name(every, files)
    wanted = next((preset for preset in every if preset.key == chosen), None)
    plain = all(link.kind in _PLAIN or link.kind.startswith("ModelSampling") for link in _chain(model))
    if wanted is not None and wanted.files and not known and plain and files and all(map(is_base, files)):
        yield (
            f"preset is {chosen}, and nothing but {' and '.join(files)} is loaded, which is no few-step student: load "
            f"the student's file or LoRA, called {wanted.files[0]}, or sample with more steps and guidance"
        )
    if len(known) == 1 and chosen in {preset.key for preset in every} - {*known}:
        ((key, (_, file)),) = known.items()
        yield another_training(chosen, key, file)


def _of_training(inputs: Mapping[str, Any]) -> Iterator[str]:
    prompts, model = inputs.get("prompts"), inputs.get("model")
    digits = isinstance(prompts, str) and _DIGITS.match(prompts) and isinstance(model, Link)
    if digits and not any(map(_draws_digits, _chain(model))):
        yield "prompts are still those of the demo model, which draws digits: write your own, one in each line"
    first, steps = inputs.get("method.regression_steps"), inputs.get("steps")
    if inputs.get("method") == "dmd2" and isinstance(first, int) and isinstance(steps, int) and 0 < steps <= first:
        yield (
            f"training steps is {steps}, and in the first {first} (regression_steps) the student copies pairs of the "
            f"teacher, so that DMD2 itself has none: set training steps above {first}, or regression_steps lower"
        )


def _text(link: Any) -> str:
    """The text of a prompt that is typed in the node before."""
    value = link.inputs.get("text") if isinstance(link, Link) else None
    return value.strip() if isinstance(value, str) else ""


def _chain(link: Any) -> Iterator[Link]:
    """The nodes that a MODEL goes through, nearest first."""
    for _ in range(_FURTHEST):
        if not isinstance(link, Link):
            return
        yield link
        link = link.inputs.get("model")


def _draws_digits(link: Link) -> bool:
    """Whether a node loads a model that comes with Retort."""
    names = (value for value in dict(link.inputs).values() if isinstance(value, str))
    return link.kind == "RetortEmbeddedModel" or any(name.startswith("digits") for name in names)


def _trained(name: str) -> Recipe | str | None:
    """How a student that Retort trained is sampled, "" where its LoRA does not say; None for another file."""
    path = folder_paths.get_full_path("loras", name)
    if path is None or not path.endswith(".safetensors"):
        return None
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        _log.debug("%s cannot be read: %s", path, error)  # whoever loads it says so
        return None
    if notes.get("retort.method") not in of_group("distillation"):
        return None
    try:
        return recipes.read(notes) or ""
    except ValueError as error:
        _log.debug("the recipe of %s cannot be read: %s", path, error)
        return ""
