"""What each published few-step student needs: integer timesteps, mode, start, cfg, shift and which models it fits.

A preset holds the numbers that a student was trained with; `sigmas` turns them into a grid whose every level gives the
network exactly that integer timestep, and `check` says what is wrong when a model cannot be the preset's. Papers and
repositories are named per preset in `source`. Facts that no primary source confirms say so in `note`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from .distilled import MODES, STARTS, Mode, Start
from .path import KINDS, NoisePath
from .schedule import Schedule

Family = Literal["eps", "v", "flow", "any"]
FAMILIES: tuple[str, ...] = get_args(Family)
_PATHS = {"eps": ("VE",), "v": ("VE", "VP"), "flow": ("FLOW",), "any": KINDS}
_EXAMPLES = {"eps": "an eps model (SD1.5, SDXL)", "v": "a v-prediction model", "flow": "a flow model (SD3, Flux)"}


class PresetMismatch(ValueError):
    """The preset cannot be used as asked; the message names the value at fault and the remedy."""


@dataclass(frozen=True)
class Preset:
    """One published student. Raises ValueError naming the field when a value makes no sense.

    timesteps: one tuple of descending network timesteps (0 .. 1000) per step count, the default first; only the custom
    preset has none. family: what the network predicts. paths: the NoisePath kinds it runs on, by default those of the
    family. shift: flow shift to set on the model. latent_channels, latent_dims (2 image, 3 video): None where any
    fits. note: which published file, and where it goes.
    """

    key: str
    title: str
    family: Family
    timesteps: tuple[tuple[int, ...], ...]
    mode: Mode
    start: Start = "unit"
    cfg: float = 1.0
    paths: tuple[str, ...] = ()
    shift: float | None = None
    latent_channels: int | None = None
    latent_dims: int | None = None
    note: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        def require(ok: bool, field: str, remedy: str) -> None:
            if not ok:
                raise ValueError(f"Preset {self.key!r}: {field} is {vars(self)[field]!r}; {remedy}")

        require(self.family in FAMILIES, "family", f"use one of {', '.join(FAMILIES)}")
        require(self.mode in MODES, "mode", f"use one of {', '.join(MODES)}")
        require(self.start in STARTS, "start", f"use one of {', '.join(STARTS)}")
        require(self.cfg > 0, "cfg", "use a positive number, 1 for a student without guidance")
        require(self.shift is None or self.shift > 0, "shift", "use a positive number or None")
        require(self.latent_dims in (None, 2, 3), "latent_dims", "use 2 (image), 3 (video) or None")
        require(self.latent_channels is None or self.latent_channels > 0, "latent_channels", "use a count or None")
        if not self.paths:
            object.__setattr__(self, "paths", _PATHS[self.family])
        allowed = _PATHS[self.family]
        require(all(p in allowed for p in self.paths), "paths", f"family {self.family!r} runs on {', '.join(allowed)}")
        require(all(self.timesteps), "timesteps", "every step count needs at least one timestep")
        for grid in self.timesteps:
            require(all(0 <= t <= 1000 for t in grid), "timesteps", "the network's timesteps lie in 0 .. 1000")
            require(_descending(grid), "timesteps", "list each step count's timesteps from high to low")
            require(self.mode != "single" or len(grid) == 1, "timesteps", "mode 'single' makes exactly one call")
        counts = self.step_counts
        require(len(set(counts)) == len(counts), "timesteps", "give each step count once")

    @property
    def step_counts(self) -> tuple[int, ...]:
        """The step counts that the preset knows, the default first; empty for the custom preset."""
        return tuple(len(grid) for grid in self.timesteps)


def _descending(grid: tuple[int, ...]) -> bool:
    return all(a > b for a, b in zip(grid, grid[1:], strict=False))


def timesteps(preset: Preset, steps: int | None = None) -> tuple[int, ...]:
    """The integers that the network receives, one per step; steps None takes the preset's default count.

    Raises PresetMismatch for zero or fewer steps and for a count that the student was not trained for.
    """
    if not preset.timesteps:
        raise PresetMismatch(
            f"preset {preset.title!r} has no timesteps of its own; type them, from high to low, such as "
            "999, 749, 499, 249"
        )
    if steps is None:
        return preset.timesteps[0]
    known = ", ".join(str(n) for n in sorted(preset.step_counts))
    if steps < 1:
        raise PresetMismatch(f"steps is {steps}, so nothing would be sampled; preset {preset.title!r} takes {known}")
    for grid in preset.timesteps:
        if len(grid) == steps:
            return grid
    raise PresetMismatch(
        f"steps is {steps}, and {preset.title!r} was trained for {known}; "
        "use that, or the custom preset with timesteps of your own"
    )


def sigmas(preset: Preset, steps: int | None, schedule: Schedule, path: NoisePath) -> Tensor:
    """The levels of the preset's timesteps on this model's schedule and path: float32 (steps + 1,), descending to 0.

    Every level s satisfies schedule.timestep(s) == t, so the network is told the integer it was trained with (t / 1000
    where a flow counts in units of one; of 1 .. 1000 ten have no float32 level, and no preset here uses those: they are
    met within 1.2e-7). Raises PresetMismatch where the schedule has no such level.
    """
    return torch.tensor([_level(t, preset, schedule, path) for t in timesteps(preset, steps)] + [0.0])


def start_level(preset: Preset, schedule: Schedule, path: NoisePath) -> float:
    """The highest level that the student starts from, over its step counts; a grid below it is a part of one."""
    return max(_level(grid[0], preset, schedule, path) for grid in preset.timesteps)


def _level(t: int, preset: Preset, schedule: Schedule, path: NoisePath) -> float:
    if path.kind == "FLOW":
        unit = float(schedule.timestep(torch.tensor(1.0)))
        # A flow's timestep is proportional to the level. schedule.sigma() would apply the shift to integers that
        # are shifted already. A float just below a power of two (127, 511, ..) is met to its last bit but one.
        wanted, slack, candidates = t / 1000 * unit, 2.0**-23, [torch.tensor(t / 1000)]
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


def check(preset: Preset, path_kind: str, prediction: str, latent_channels: int, latent_dims: int) -> None:
    """Raises PresetMismatch, naming the mismatch and presets that do fit, when the model cannot be the preset's.

    path_kind: NoisePath's kind. prediction: "eps", "v", "flow", "x0" or "edm". latent_dims: 2 image, 3 video.
    """
    wrong = _mismatch(preset, path_kind, prediction, latent_channels, latent_dims)
    if wrong is None:
        return
    fit = [p.key for p in PRESETS.values() if _mismatch(p, path_kind, prediction, latent_channels, latent_dims) is None]
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
        kinds = {2: "images", 3: "video"}
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


_QUARTERS = (999, 749, 499, 249)
_EIGHTHS = (999, 874, 749, 624, 499, 374, 249, 124)
# LCMScheduler's grids: every 20th timestep is the teacher's, spread over the step count.
_LCM = (
    (999, 759, 499, 259),
    (999,),
    (999, 499),
    (999, 679, 339),
    (999, 799, 599, 399, 199),
    (999, 839, 679, 499, 339, 179),
    (999, 859, 719, 579, 439, 299, 159),
    (999, 879, 759, 639, 499, 379, 259, 139),
)
_DMD2 = "Yin et al. 2024, arXiv 2405.14867; github.com/tianweiy/DMD2"
_TDM = "Luo et al. 2025, arXiv 2503.06674; github.com/Luo-Yihong/TDM"

_ALL = (
    Preset(
        key="dmd2_sdxl_4step", title="DMD2, SDXL, 4 steps", family="eps", timesteps=(_QUARTERS,), mode="renoise",
        latent_channels=4, latent_dims=2, source=_DMD2,
        note="Put dmd2_sdxl_4step_lora_fp16.safetensors (huggingface.co/tianweiy/DMD2) into models/loras and load it "
        "on an SDXL checkpoint, or dmd2_sdxl_4step_unet_fp16.bin into models/diffusion_models.",
    ),
    Preset(
        key="dmd2_sdxl_1step", title="DMD2, SDXL, 1 step", family="eps", timesteps=((399,),), mode="single",
        latent_channels=4, latent_dims=2, source=_DMD2,
        note="Put dmd2_sdxl_1step_unet_fp16.bin (huggingface.co/tianweiy/DMD2) into models/diffusion_models; "
        "no LoRA of it was published.",
    ),
    Preset(
        key="dmd2_sd15_1step", title="DMD2, SD1.5, 1 step", family="eps", timesteps=((999,),), mode="single",
        latent_channels=4, latent_dims=2, source=_DMD2,
        note="The student (pytorch_model.bin in model/sdv1.5 of huggingface.co/tianweiy/DMD2) is a diffusers UNet: put "
        "it into models/diffusion_models.",
    ),
    Preset(
        key="f_distill", title="f-distill, SD1.5 and SDXL", family="eps", timesteps=(_QUARTERS, (999,), (999, 499)),
        mode="renoise", latent_channels=4, latent_dims=2,
        source="Xu et al. 2025, arXiv 2502.15681; github.com/NVlabs/FastGen",
        note="No text-to-image student is published yet: for students that FastGen trained. Its levels (linspace from "
        "0.999) are 999, 749.25, 499.5 and 249.75, here the nearest trained integers.",
    ),
    Preset(
        key="di_star_sdxl_1step", title="Diff-Instruct*, SDXL, 1 step", family="eps", timesteps=((399,),),
        mode="single", latent_channels=4, latent_dims=2,
        source="Luo et al. 2024, arXiv 2410.20898; github.com/pkulwj1994/diff_instruct_star",
        note="Put the UNet of huggingface.co/XDG-XHS/distar_long_1step (unet/diffusion_pytorch_model.fp16.safetensors) "
        "into models/diffusion_models. The short, SIM, DI and DI++ students of the same author take this preset too.",
    ),
    Preset(
        key="tdm_sd3", title="TDM, SD3 medium, 4 steps", family="flow", timesteps=((999, 947, 856, 666),),
        mode="deterministic", shift=6.0, latent_channels=16, latent_dims=2, source=_TDM,
        note="Put the LoRA of huggingface.co/Luo-Yihong/TDM_sd3_lora into models/loras and load it on SD3 medium at "
        "strength 0.125 (the file stores no alpha).",
    ),
    Preset(
        key="tdm_sd15", title="TDM, SD1.5 (Dreamshaper 7), 4 steps", family="eps", timesteps=((999, 749, 500, 250),),
        mode="deterministic", latent_channels=4, latent_dims=2, source=_TDM,
        note="Put tdm_dreamshaper.pt (huggingface.co/Luo-Yihong/TDM_dreamshaper_LoRA) into models/loras and load it on "
        "Dreamshaper 7. Its strength is not published; 1 is how its README loads it.",
    ),
    Preset(
        key="tdm_cogvideox_2b", title="TDM, CogVideoX-2B, 4 steps", family="v", paths=("VP",),
        timesteps=((999, 856, 665, 399),), mode="deterministic", latent_channels=16, latent_dims=3,
        source=_TDM,
        note="Put the LoRA of huggingface.co/Luo-Yihong/TDM_CogVideoX-2B_LoRA into models/loras and load it on "
        "CogVideoX-2B. Its strength is not published; 1 is how its README loads it.",
    ),
    Preset(
        key="instarevive", title="InstaRevive, 1 step", family="eps", timesteps=((400,),), mode="single",
        start="latent", latent_channels=4, latent_dims=2,
        source="Zhu et al. 2025, arXiv 2504.15513; github.com/EternalEvan/InstaRevive",
        note="InstaRevive_v1.ckpt is a PixArt-alpha 512 transformer (betas linear from 1e-4 to 0.02): put it into "
        "models/diffusion_models. The latent image is the degraded picture, encoded; no noise is added.",
    ),
    Preset(
        key="lcm", title="LCM and LCM-LoRA", family="eps", timesteps=_LCM, mode="renoise", latent_channels=4,
        latent_dims=2,
        source="Luo et al. 2023, arXiv 2310.04378 and 2311.05556; github.com/luosiallen/latent-consistency-model",
        note="Put the LoRA of huggingface.co/latent-consistency/lcm-lora-sdxl (or -sdv1-5) into models/loras. "
        "cfg 1 to 2.",
    ),
    Preset(
        key="turbo", title="SDXL Turbo and SD Turbo", family="eps", timesteps=((999,), (999, 499), _QUARTERS),
        mode="renoise", latent_channels=4, latent_dims=2,
        source="Sauer et al. 2023, arXiv 2311.17042",
        note="Put sd_xl_turbo_1.0_fp16.safetensors or sd_turbo.safetensors into models/checkpoints. The timesteps are "
        "ADD's as generally reported, not confirmed in code; ComfyUI's own SDTurboScheduler takes 999, 899, 799, 699.",
    ),
    Preset(
        key="lightning_sdxl", title="SDXL Lightning", family="eps", timesteps=(_QUARTERS, (999, 499), _EIGHTHS),
        mode="deterministic", latent_channels=4, latent_dims=2,
        source="Lin et al. 2024, arXiv 2402.13929; huggingface.co/ByteDance/SDXL-Lightning",
        note="Take the file for your step count: sdxl_lightning_4step_lora.safetensors into models/loras, or "
        "sdxl_lightning_4step.safetensors into models/checkpoints.",
    ),
    Preset(
        key="digits_flow", title="Embedded digits students, flow", family="flow",
        timesteps=((1000,), (1000, 900, 750, 500)), mode="renoise", shift=3.0, latent_channels=16, latent_dims=2,
        source="models/README.md",
        note="Of the LoRAs that come with Retort load on the embedded flow model, for 4 steps, "
        "digits_flow_dmd2_4step.safetensors; for 1 step digits_flow_dmd2_1step.safetensors, or digits_flow_js_1step, "
        "digits_flow_fkl_1step or digits_flow_di_star_1step.",
    ),
    Preset(
        key="digits_flow_tdm", title="Embedded digits student, flow, TDM", family="flow",
        timesteps=((1000, 900, 750, 500),), mode="deterministic", shift=3.0, latent_channels=16, latent_dims=2,
        source="models/README.md",
        note="Load digits_flow_tdm_4step.safetensors, which comes with Retort, on the embedded flow model.",
    ),
    Preset(
        key="digits_eps", title="Embedded digits student, eps", family="eps", timesteps=((399,),), mode="renoise",
        latent_channels=16, latent_dims=2, source="models/README.md",
        note="Load digits_eps_dmd2_1step.safetensors, which comes with Retort, on the embedded eps model.",
    ),
    Preset(
        key="digits_eps_tdm", title="Embedded digits student, eps, TDM", family="eps", timesteps=(_QUARTERS,),
        mode="deterministic", latent_channels=16, latent_dims=2, source="models/README.md",
        note="Load digits_eps_tdm_4step.safetensors, which comes with Retort, on the embedded eps model.",
    ),
    Preset(
        key="custom", title="Custom timesteps", family="any", timesteps=(), mode="renoise",
        note="Type the network's timesteps from high to low.",
    ),
)  # fmt: skip

PRESETS: dict[str, Preset] = {preset.key: preset for preset in _ALL}
