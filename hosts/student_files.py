"""How the student of a LoRA file is sampled: by the recipe that the file carries, or by its published name."""

from __future__ import annotations

from collections.abc import Iterable

from ..sampling.presets import Preset
from ..sampling.students.files import matching
from ..trainers import recipes
from .contract import Host


def student_of(host: Host, name: str, presets: Iterable[Preset]) -> tuple[Preset, str]:
    """(preset, how it was found) of a LoRA of the host's list.

    presets: those whose published files are known by name. ValueError for a file of neither kind, and for a name that
    may be of two.
    """
    recipe = recipes.read(host.lora_metadata(name))
    if recipe is not None:
        taught = f", taught by {recipe.method}" if recipe.method else ""
        return recipe.preset, f"as its file says{taught}"
    found = matching(presets, name)
    if len(found) > 1:
        raise ValueError(
            f"lora_name: {name} may be the file of {' or '.join(preset.key for preset in found)}: load it with Load "
            "LoRA, and choose one of these in Distilled Setup"
        )
    if not found:
        raise ValueError(
            f"lora_name: {name} carries no recipe of a student, and has no published student's name: load it with Load "
            "LoRA, and choose a preset in Distilled Setup"
        )
    return found[0], f"by its name, which is that of the preset {found[0].key}"
