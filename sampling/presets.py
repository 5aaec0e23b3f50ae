"""The presets of published few-step students: their levels on a model's schedule, and which models they fit.

Each is a JSON file in `students`, whose form `students/form.py` describes and whose fields `Preset` does. `sigmas`
turns a preset into a grid whose every level gives the network exactly what it was trained with, and `check` says what
is wrong when a model cannot be the preset's. Papers and repositories are named per preset in `source`; how sure its
numbers are is its `certainty`, and what no primary source confirms its `note` says.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .distilled import Mode, Start
from .path import NoisePath, level_of, time_of
from .schedule import Schedule
from .students.form import from_json
from .students.preset import Preset, PresetMismatch, are_levels, tokens_of

__all__ = [
    "PRESETS", "Preset", "PresetMismatch", "check", "count", "custom", "cut", "levels", "parse_timesteps", "refining",
    "sigmas", "start_level", "timesteps", "told",
]  # fmt: skip

_EXAMPLES = {
    "eps": "an eps model (SD1.5, SDXL)", "v": "a v-prediction model", "edm": "an EDM model (Playground 2.5)",
    "flow": "a flow model (SD3, Flux)",
}  # fmt: skip
# Of a picture whose size nobody says, in pixels.
SIZE = (1024, 1024)
_NAMED = 8  # presets in a message


def count(preset: Preset, steps: int | None = None) -> int:
    """How many calls a run makes; steps None takes the preset's default count.

    Raises PresetMismatch for zero or fewer steps and for a count that the student was not trained for.
    """
    if not preset.step_counts:
        raise PresetMismatch(
            f"preset {preset.title!r} has no timesteps of its own; type them, from high to low, such as "
            "999, 749, 499, 249"
        )
    if steps is None:
        return preset.step_counts[0]
    known = ", ".join(str(n) for n in sorted(preset.step_counts))
    if steps < 1:
        raise PresetMismatch(f"steps is {steps}, so nothing would be sampled; preset {preset.title!r} takes {known}")
    if steps in preset.step_counts:
        return steps
    if preset.key == "custom":
        raise PresetMismatch(
            f"steps is {steps}, and timesteps has {known}: set steps to 0 or {known}, or type {steps} timesteps"
        )
    raise PresetMismatch(
        f"steps is {steps}, and {preset.title!r} was trained for {known}; "
        "use that, or the custom preset with timesteps of your own"
    )


def timesteps(preset: Preset, steps: int | None = None) -> tuple[int, ...]:
    """The integers that the network receives, one per step, of a preset that has `timesteps`; errors as `count`'s."""
    return preset.timesteps[preset.step_counts.index(count(preset, steps))]


def levels(preset: Preset, steps: int | None = None, size: tuple[int, int] | None = None) -> Tensor:
    """The levels of a flow's preset that has no timesteps: float32 (steps,), descending; errors as `count`'s.

    They are the flow's times, in float64 where the preset lists them for a model that is carried as VE. size: (width,
    height) of the picture in pixels, which matters where `preset.sized`; None: 1024 x 1024.
    """
    calls = count(preset, steps)
    row = preset.step_counts.index(calls)
    if preset.levels:
        return torch.tensor(preset.levels[row], dtype=torch.float64 if "VE" in preset.paths else torch.float32)
    width, height = size or SIZE
    found = preset.shifted(torch.tensor(preset.unshifted[row]), calls, tokens_of(width, height))
    if not are_levels(found.tolist()):
        raise PresetMismatch(
            f"preset {preset.title!r} has no levels for {width} x {height} pixels: its mu would be "
            f"{preset.mu_of(calls, tokens_of(width, height)):.3g} there, where float32 does not tell them apart; "
            "sample at a size that the student was made for"
        )
    return found


def sigmas(
    preset: Preset, steps: int | None, schedule: Schedule, path: NoisePath, size: tuple[int, int] | None = None
) -> Tensor:
    """The preset's levels on this model's schedule and path: float32 (steps + 1,), descending to 0.

    Of integers every level s satisfies schedule.timestep(s) == t, so the network is told the integer it was trained
    with (t / 1000 where a flow counts in units of one; of 1 .. 1000 ten have no float32 level, and no preset here uses
    those: they are met within 1.2e-7, and within 2.4e-7 on a flow that is carried as VE). A flow's levels are what its
    network is told, whatever the model's own shift is. size: see `levels`. Raises PresetMismatch where the schedule has
    no such level.
    """
    if preset.sigmas:
        return torch.tensor([*preset.sigmas[preset.step_counts.index(count(preset, steps))], 0.0])
    if preset.levels or preset.unshifted:
        return torch.cat([_carried(levels(preset, steps, size), path), torch.zeros(1)])
    return torch.tensor([_level(t, preset, schedule, path) for t in timesteps(preset, steps)] + [0.0])


def start_level(preset: Preset, schedule: Schedule, path: NoisePath) -> float:
    """The highest level that the student starts from, over its step counts; a grid below it is a part of one."""
    if preset.timesteps:
        return max(_level(grid[0], preset, schedule, path) for grid in preset.timesteps)
    if preset.sigmas:
        return max(grid[0] for grid in preset.sigmas)
    return max(float(_carried(levels(preset, n), path)[0]) for n in preset.step_counts)


def highest(path: NoisePath) -> int:
    """The highest timestep that may be typed, in thousandths of the schedule."""
    return 1000 if path.flow else 999


def _carried(times: Tensor, path: NoisePath) -> Tensor:
    """Levels, float32, of a flow's times."""
    return level_of(times).float() if path.rectified else times


def _level(t: int, preset: Preset, schedule: Schedule, path: NoisePath) -> float:
    if path.kind == "FLOW":
        unit = float(schedule.timestep(torch.tensor(1.0)))
        # A flow's timestep is proportional to the level. schedule.sigma() would apply the shift to integers that
        # are shifted already. A float just below a power of two (127, 511, ..) is met to its last bit but one.
        wanted, slack, candidates = t / 1000 * unit, 2.0**-23, [torch.tensor(t / 1000)]
    elif path.rectified:
        # Any level has a time there; the network knows those between the table's ends.
        low, high = (float(time_of(end)) for end in (schedule.sigma_min, schedule.sigma_max))
        if not low <= t / 1000 <= high:
            raise PresetMismatch(
                f"preset {preset.title!r} needs timestep {t}, and this model's go from {math.ceil(1000 * low)} to "
                f"{math.floor(1000 * high)}; type others"
            )
        wanted, slack = t / 1000, 2.0**-22
        candidates = [level_of(torch.tensor(wanted, dtype=torch.float64))]
    else:
        # The table itself first: sigma(t) goes through a logarithm and may miss the table's last bit.
        wanted, slack, candidates = float(t), 0.0, [schedule.sigma(torch.tensor(float(t)))]
        if t < len(schedule.sigmas):
            candidates.insert(0, schedule.sigmas[t].cpu())
    for level in candidates:
        if float(level) > 0 and math.isclose(float(schedule.timestep(level.float())), wanted, rel_tol=slack):
            return float(level)
    raise PresetMismatch(
        f"preset {preset.title!r} needs timestep {t}, and this model's noise schedule "
        f"({len(schedule.sigmas)} levels, sigma {float(schedule.sigma_min):.4g} to {float(schedule.sigma_max):.4g}) "
        "has no level with it; remove nodes that change the model's sampling, or load the model that the preset is for"
    )


def cut(
    preset: Preset, sigmas: Tensor, denoise: float, schedule: Schedule, path: NoisePath,
    size: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """The end of a preset's own grid for image to image: from the trained level that is nearest to `denoise` on.

    denoise (0 .. 1] means what it does in ComfyUI, the level at that share of a full schedule: of the preset's own
    shift or mu where it has one, else of the model's. Nearest is in the network's timesteps. The levels that are left
    are the student's own, and never fewer than one; of two that are as near the lower is taken. size: see `levels`.
    """
    steps = len(sigmas) - 1
    if path.kind == "FLOW" and (preset.shift is not None or preset.mu is not None):
        wanted = preset.shifted(denoise, steps, tokens_of(*(size or SIZE)))
    else:
        wanted = torch.tensor(min(float(schedule.percent_to_sigma(1 - denoise)), float(sigmas[0])))
    told, target = schedule.timestep(sigmas[:-1]).tolist(), float(schedule.timestep(wanted))
    first = min(reversed(range(steps)), key=lambda i: abs(told[i] - target))
    return sigmas[first:]


def refining(preset: Preset) -> Preset:
    """The preset of a student's second stage: its levels and mode, begun on a latent image noised to the first of them.

    PresetMismatch for a student that has one stage.
    """
    if preset.refine is None:
        raise PresetMismatch(
            f"stage is 'refine', and {preset.title!r} was published with one stage; choose 'first', or a preset with "
            "two, such as ltx2_distilled"
        )
    return replace(
        preset, title=f"{preset.title}, second stage", timesteps=(), unshifted=(), mu=None,
        levels=(preset.refine.levels,), mode=preset.refine.mode or preset.mode, start="noised", refine=None,
    )  # fmt: skip


def told(sigmas: Tensor, schedule: Schedule, path: NoisePath) -> str:
    """What a grid's levels are called: a flow's levels, and elsewhere the network's timesteps."""
    numbers = sigmas[:-1] if path.kind == "FLOW" else schedule.timestep(sigmas[:-1])
    return ", ".join(f"{float(number):.5g}" for number in numbers)


def check(
    preset: Preset, path_kind: str, prediction: str, latent_channels: int, latent_dims: int, kind: str = ""
) -> None:
    """Raises PresetMismatch, naming the mismatch and presets that do fit, when the model cannot be the preset's.

    path_kind: NoisePath's kind. prediction: "eps", "v", "flow", "x0" or "edm". latent_dims: 2 image, 3 video. kind:
    name of ComfyUI's class of the model, where it is known; presets of its own are named first.
    """
    wrong = _mismatch(preset, path_kind, prediction, latent_channels, latent_dims)
    if wrong is None:
        return
    every = PRESETS.values()
    fitting = [p for p in every if _mismatch(p, path_kind, prediction, latent_channels, latent_dims) is None]
    fit = [p.key for p in sorted(fitting, key=lambda p: kind not in p.architectures)]
    if len(fit) > _NAMED:  # the custom preset, which always fits, is the last
        fit = [*fit[: _NAMED - 1], fit[-1]]
    where = f" {preset.note}" if preset.note else ""
    raise PresetMismatch(
        f"preset {preset.title!r} {wrong}. Load the model that it was made for, or choose a preset that fits this "
        f"one: {', '.join(fit)}.{where}"
    )


def _mismatch(preset: Preset, path_kind: str, prediction: str, channels: int, dims: int) -> str | None:
    if preset.family != "any" and prediction != preset.family:
        return f"is for {_EXAMPLES[preset.family]}, and this model predicts {prediction!r}"
    if path_kind not in preset.paths:
        return f"runs on the noise path {' or '.join(preset.paths)}, and this model's is {path_kind}"
    if preset.latent_dims not in (None, dims):
        kinds = {1: "sound", 2: "images", 3: "video"}
        return f"makes {kinds[preset.latent_dims]}, and this model's latents are for {kinds[dims]}"
    if preset.latent_channels not in (None, channels):
        return f"has latents of {preset.latent_channels} channels, and this model's have {channels}"
    return None


def parse_timesteps(text: str, highest: int = 999) -> tuple[int, ...]:
    """The integers of a text such as "999, 749, 499, 249"; highest: 999, or 1000 for a flow model.

    Raises PresetMismatch for an empty text, anything but integers, values that do not descend or out of 0 .. highest.
    """
    entries = text.replace(",", " ").replace(";", " ").split()
    if not entries:
        raise PresetMismatch("timesteps is empty; type one per step, from high to low, such as 999, 749, 499, 249")
    for entry in entries:
        if not (entry.isascii() and entry.removeprefix("-").isdigit()):
            raise PresetMismatch(f"timesteps: {entry!r} is not a whole number; write them like 999, 749, 499, 249")
        if len(entry) > 6 or not 0 <= int(entry) <= highest:
            raise PresetMismatch(f"timesteps: {entry} is outside 0 .. {highest}, the timesteps that the network knows")
    values = tuple(int(entry) for entry in entries)
    for before, after in zip(values, values[1:], strict=False):
        if after >= before:
            raise PresetMismatch(f"timesteps: {after} follows {before}; each must be lower than the one before")
    return values


def custom(text: str, mode: Mode = "renoise", start: Start = "unit", highest: int = 999) -> Preset:
    """The custom preset with the timesteps typed in `text`; errors as parse_timesteps' and Preset's."""
    return replace(PRESETS["custom"], timesteps=(parse_timesteps(text, highest),), mode=mode, start=start)


def _read() -> dict[str, Preset]:
    """Our own rows by their keys, and last the custom preset."""
    files = sorted((Path(__file__).parent / "students").glob("*.json"))
    rows = {path.stem: from_json(json.loads(path.read_text(encoding="utf-8")), path.stem) for path in files}
    note = "Type the network's timesteps from high to low."
    return {**rows, "custom": Preset(key="custom", title="Custom timesteps", family="any", note=note)}


PRESETS: dict[str, Preset] = _read()
