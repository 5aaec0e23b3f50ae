"""How the student of a LoRA file is sampled: by the recipe that the file carries, or by its published name."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..sampling.presets import Preset
from ..trainers import recipes
from .contract import Host
from .recognise import by_name, fits


def candidates(host: Host, name: str, presets: Iterable[Preset], kind: str = "") -> tuple[list[Preset], str]:
    """(presets that a LoRA of the host's list may be of, how they were found): of a file's own recipe one.

    presets: those whose published files are known by name. kind: of the model, see `recognise.by_name`. ValueError
    where there is none, and for a recipe that cannot be read.
    """
    try:
        recipe = recipes.read(host.lora_metadata(name))
    except ValueError as error:
        raise ValueError(f"lora_name: {name}: {error}") from error
    if recipe is not None:
        taught = f", taught by {recipe.method}" if recipe.method else ""
        return [recipe.preset], f"as its file says{taught}"
    found = [preset for preset, _ in by_name(presets, [name], kind).values()]
    if not found:
        raise ValueError(
            f"lora_name: {name} carries no recipe of a student, and has no published student's name: load it with Load "
            "LoRA, and choose a preset in Distilled Setup"
        )
    return found, "by its name"


def student_of(
    host: Host, name: str, presets: Iterable[Preset], kind: str, check: Callable[[Preset], None]
) -> tuple[Preset, str]:
    """(the one that a model can be the student of, how it was found).

    kind: of the model. check: PresetMismatch where the model cannot be a preset's. ValueError as `candidates`', where
    none fits, and where two are as likely.
    """
    found, how = candidates(host, name, presets, kind)
    fitting = [preset for preset in found if fits(check, preset)]
    if not fitting:
        check(found[0])  # says why not
    if len(fitting) > 1:
        raise ValueError(
            f"lora_name: {name} may be the file of {' or '.join(preset.key for preset in fitting)}: load it with Load "
            "LoRA, and choose one of these in Distilled Setup"
        )
    return fitting[0], how
