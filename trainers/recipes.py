"""A LoRA that says how it is sampled: a student's preset in its file's metadata, under the key `retort.student`.

The value is a JSON object: "schema" (1); "preset", in the form of `sampling.students.form`, its levels as the network
was shown them; "method"; and "base", what the student was made from, by "name" and "architecture". The schema is
described for others in docs/RetortLoadStudent.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..files.strangers import parse, plain
from ..sampling.path import time_of
from ..sampling.students.form import from_json, to_json
from ..sampling.students.preset import Preset
from .objectives.parts.contract import Objective, TrainableDenoiser

KEY, SCHEMA = "retort.student", 1
MOST_BYTES = 1 << 18
_LONGEST = 80  # of a title
_NAME = 200  # characters of a base's name


@dataclass(frozen=True)
class Recipe:
    """preset: how the student is sampled. method: what taught it. base: its name and architecture, where known."""

    preset: Preset
    method: str = ""
    base: Mapping[str, str] = field(default_factory=dict)


def preset_of(
    title: str,
    objective: Objective,
    denoiser: TrainableDenoiser,
    form: tuple[int, int] | None,
    shifts: tuple[float, float] | None = None,
) -> Preset | None:
    """How an objective's student is sampled; None for methods without one, and for predictions that no preset has.

    form: (channels, dimensions) of the model's latents, as the model itself says them: a video with sound is trained on
    latents of several parts, and a single frame may come without its axis. shifts: the model's own and its sound's,
    where sound has one. Levels of a flow, as its times in (0, 1], and of a continuous schedule are kept to the
    last bit; those of a table are timesteps.
    """
    grids = objective.student_grids
    if not grids or denoiser.prediction == "x0":
        return None
    given: dict[str, Any] = {}
    if denoiser.path.kind == "FLOW":
        given["levels"] = tuple(tuple(float(level) for level in grid) for grid in grids)
    elif denoiser.path.rectified:
        # In double precision, so that the level comes back from its time.
        given["levels"] = tuple(tuple(float(time_of(level.double())) for level in grid) for grid in grids)
    elif denoiser.levels.listed:
        given["timesteps"] = tuple(tuple(_timestep(denoiser, level) for level in grid) for grid in grids)
    else:
        given["sigmas"] = tuple(tuple(float(level) for level in grid) for grid in grids)
    return Preset(
        key="student",
        title=title[:_LONGEST],
        family=denoiser.prediction,
        paths=(denoiser.path.kind,),
        mode=objective.student_rule.mode,
        start=objective.student_start,
        latent_channels=None if form is None else form[0],
        latent_dims=None if form is None else form[1],
        shift=None if shifts is None else shifts[0],
        audio_shift=None if shifts is None else shifts[1],
        **given,
    )


def _timestep(denoiser: TrainableDenoiser, level: Tensor) -> int:
    return round(float(denoiser.schedule.timestep(level)))


def written(recipe: Recipe) -> str:
    """A recipe as its file has it."""
    value = {
        "schema": SCHEMA, "preset": to_json(recipe.preset), "method": recipe.method, "base": dict(recipe.base),
    }  # fmt: skip
    return json.dumps(value, sort_keys=True)


def read(metadata: Mapping[str, str]) -> Recipe | None:
    """The recipe of a file's metadata; None where they have none. ValueError says what is wrong with one."""
    text = metadata.get(KEY)
    if text is None:
        return None
    try:
        value = parse(text.encode(), MOST_BYTES)
        if not isinstance(value, dict):
            raise ValueError("it is no object with names and values")
        if value.get("schema") != SCHEMA:
            raise ValueError(
                f"its schema is {value.get('schema')!r:.40}, and this version of Retort knows {SCHEMA}: update Retort"
            )
        preset = from_json(value.get("preset"), "student")
    except ValueError as error:
        raise ValueError(f"the recipe in the LoRA's metadata ({KEY}) cannot be read: {plain(str(error))}") from error
    base = value.get("base")
    known = {k: _text(base.get(k)) for k in ("name", "architecture")} if isinstance(base, dict) else {}
    return Recipe(preset, _text(value.get("method")), {k: v for k, v in known.items() if v})


def _text(value: Any) -> str:
    return plain(value)[:_NAME] if isinstance(value, str) else ""

