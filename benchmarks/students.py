"""Levels of published few-step students: their makers', the presets' and what ComfyUI's own recipes give.

`python -m retort.benchmarks.students --comfyui DIR [--write]`, in ComfyUI's environment: seconds, no network. LISTS and
TIMESTEPS are the makers' formulas and lists, written down by hand once more; STOCK is what official templates and usual
advice do with core's own schedulers. --write puts the tables into RESULTS.md.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..sampling import presets
from ..sampling.presets import PRESETS
from ..sampling.students.preset import tokens_of
from .report import RESULTS, put


def shifted(shift: float, n: int) -> list[float]:
    """n even times behind a shift, exactly."""
    s = Fraction(shift)
    return [float(s * x / (1 + (s - 1) * x)) for x in (Fraction(n - k, n) for k in range(n))]


def by_mu(mu: float, times: Sequence[float]) -> list[float]:
    """Times behind mu, in double precision."""
    return [math.exp(mu) / (math.exp(mu) + 1 / x - 1) for x in times]


def even(n: int) -> list[float]:
    """1, (n - 1)/n .. 1/n."""
    return [(n - k) / n for k in range(n)]


def twice(shift: float, n: int) -> list[float]:
    """n levels, even from the highest to the lowest of a table of 1000 that is shifted, shifted once more."""
    low = shift * 0.001 / (1 + (shift - 1) * 0.001)
    times = [1 - (1 - low) * k / (n - 1) for k in range(n)]
    return [shift * x / (1 + (shift - 1) * x) for x in times]


def ended(shift: float, n: int) -> list[float]:
    """n times, even from 1 to 0.001, behind a shift."""
    times = [1 - 0.999 * k / (n - 1) for k in range(n)]
    return [shift * x / (1 + (shift - 1) * x) for x in times]


LTX = [1, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875]
QWEN21 = 0.5 + 0.4 * (4096 - 256) / (8192 - 256)
# By preset and number of steps; of students whose levels follow the size, at 1024 x 1024.
LISTS: dict[tuple[str, int], list[float]] = {
    ("minimax_h3_turbo", 8): shifted(12, 8),
    ("minimax_h3_turbo", 4): [1, 0.97297, 0.92308, 0.8],
    ("minimax_h3_turbo_768p", 4): [1, 0.94737, 0.85714, 0.66667],
    ("ltx2_distilled", 8): LTX,
    ("ltx25_distilled", 8): LTX,
    ("z_image_turbo", 8): [1, 0.95455, 0.9, 0.83333, 0.75, 0.64286, 0.5, 0.3],
    ("wan22_lightx2v_t2v", 4): [1, 0.9375, 0.83333, 0.625],
    ("wan22_lightx2v_t2v", 8): shifted(5, 8),
    ("wan22_lightx2v_i2v", 4): shifted(5, 4),
    ("wan22_lightx2v_i2v", 8): [1, 0.97222, 0.9375, 0.89286, 0.83333, 0.75, 0.625, 0.41667],
    ("krea2_turbo", 8): [1, 0.95672, 0.90453, 0.84035, 0.75951, 0.65457, 0.51284, 0.3109],
    ("qwen_image_lightning", 4): [1, 0.9, 0.75, 0.5],
    ("qwen_image_lightning", 8): shifted(3, 8),
    ("qwen_image_flash", 4): shifted(3, 4),
    ("qwen_image_21_turbo", 8): [1, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568],
    ("qwen_image_21_lightning", 4): [1, 0.85719, 0.66676, 0.4001],
    ("qwen_image_21_viggle", 6): by_mu(QWEN21, [1, 0.9375, 0.875, 0.75, 0.5, 0.25]),
    ("qwen_image_21_pruna", 8): [1, 0.93333, 0.85714, 0.76923, 0.66667, 0.54545, 0.4, 0.22222],
    ("qwen_image_21_pruna", 5): [1, 0.94, 0.85714, 0.66667, 0.4],
    ("fasth3_v2", 8): [0.9999, 0.98579, 0.96758, 0.94317, 0.90909, 0.85714, 0.76923, 0.58824],
    ("fasth3", 8): [1, 0.98824, 0.97297, 0.95238, 0.92308, 0.87805, 0.8, 0.63158],
    ("fasth3", 4): shifted(12, 4),
    ("flux2_klein", 4): [1, 0.96738, 0.90814, 0.7672],
    ("flux2_klein_rdm", 1): [1],
    ("flux2_dev_turbo", 8): [1, 0.94743, 0.8825, 0.80028, 0.6928, 0.54632, 0.33489, 0.00299],
    ("wan21_lightx2v", 4): shifted(5, 4),
    ("wan21_causvid", 9): [0.999, 0.934, 0.862, 0.756, 0.603, 0.41, 0.25, 0.14, 0.074],
    ("wan21_causvid", 4): [0.999, 0.934, 0.862, 0.756],
    ("fastwan", 3): [1, 0.757, 0.522],
    ("sfwan22", 8): [1, 0.98551, 0.96552, 0.93617, 0.86598, 0.81988, 0.75, 0.63158],
    ("rcm_wan_t2v", 4): [0.98765, 0.93378, 0.8529, 0.60898],
    ("rcm_wan_i2v", 4): [0.99502, 0.93378, 0.8529, 0.60898],
    ("chronoedit_distill", 8): shifted(2, 8),
    ("acestep15_turbo", 8): shifted(3, 8),
    ("hunyuanvideo15_distilled", 8): [1, 0.98, 0.95455, 0.92105, 0.875, 0.80769, 0.7, 0.5],
    ("hunyuanvideo15_distilled", 12): shifted(7, 12),
    ("hunyuanvideo15_lightx2v", 4): shifted(5, 4),
    ("hunyuanvideo15_sr", 6): shifted(2, 6),
    ("hunyuanvideo15_sr", 8): shifted(2, 8),
    ("flux_schnell", 1): [1],
    ("flux_schnell", 2): [1, 0.5],
    ("flux_schnell", 3): shifted(1, 3),
    ("flux_schnell", 4): [1, 0.75, 0.5, 0.25],
    ("hyper_flux", 8): by_mu(1.15, even(8)),
    ("hyper_flux", 16): by_mu(1.15, even(16)),
    ("flux_turbo_alpha", 8): by_mu(1.15, even(8)),
    ("ernie_image_turbo", 8): [1, 0.96552, 0.92308, 0.86957, 0.8, 0.70588, 0.57143, 0.36364],
    ("boogu_turbo", 4): [0.999, 0.749, 0.5, 0.25],
    ("hidream_i1_fast", 16): twice(3, 16),
    ("hidream_i1_dev", 28): twice(6, 28),
    ("mage_flow_turbo", 4): shifted(6, 4),
    ("pid_4step", 4): [0.999, 0.866, 0.634, 0.342],
    ("sd35_large_turbo", 4): [1, 0.85769, 0.60215, 0.00893],
    ("flash_sd3", 4): twice(3, 4),
    ("fasthunyuan", 6): [1, 0.98837, 0.97143, 0.94444, 0.89474, 0.77273],
    ("ltxv_098_distilled", 7): [1, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725],
    ("z_image_fun_distill", 8): shifted(3, 8),
    ("z_image_fun_distill", 4): shifted(3, 4),
    ("z_image_fun_distill", 2): [1, 0.75],
    ("tdm_r1_z_image", 4): shifted(3, 4),
    ("minimax_h3_turbo_ref2v", 4): [1, 0.97297, 0.92308, 0.8],
    ("qwen_image_wuli", 2): [1, 0.75],
    ("firered_edit_lightning", 8): shifted(3.1, 8),
    ("anima_turbo", 8): [1, 0.95455, 0.9, 0.83333, 0.75, 0.64286, 0.5, 0.3],
    ("lens_turbo", 4): [1, 0.90453, 0.75951, 0.51284],
    ("ming_image_design", 12): by_mu(1.15, even(12)),
    ("seedvr2", 1): [1],
    ("wan_infinitetalk_lightx2v", 4): ended(7, 4),
    ("wan_infinitetalk_multi_lightx2v", 4): ended(11, 4),
    ("hunyuanimage21_distilled", 8): [1, 0.96552, 0.92308, 0.86957, 0.8, 0.70588, 0.57143, 0.36364],
    ("kandinsky5_distilled_5s", 16): shifted(5, 16),
    ("kandinsky5_distilled_10s", 16): shifted(10, 16),
    ("causal_forcing", 4): shifted(5, 4),
    ("self_forcing", 4): shifted(5, 4),
}
_O1 = (
    999, 987, 974, 960, 945, 929, 913, 895, 877, 857, 836, 814, 790, 764, 737, 707, 675, 640, 602, 560, 515, 464, 409,
    347, 278, 199, 110, 8,
)  # fmt: skip
# Whole timesteps of the network.
TIMESTEPS: dict[tuple[str, int], tuple[int, ...]] = {
    ("wan_animate2_distill", 10): tuple(int(1000 * level) for level in shifted(5, 10)),
    ("hidream_o1_dev", 28): _O1,
    ("hyper_sdxl_1step", 1): (800,),
    ("hyper_sd", 4): (999, 749, 499, 249),
    ("turbo", 4): (999, 899, 799, 699),
    ("turbo", 1): (999,),
    ("nitrosd_realism", 3): (999, 749, 499),
    ("flash", 4): (999, 759, 499, 259),
}
SIZES = ((512, 512), (1024, 1024), (1056, 1056), (1536, 1536), (2048, 2048))


class Core:
    """ComfyUI's schedules and schedulers."""

    def __init__(self) -> None:
        self.sampling: Any = importlib.import_module("comfy.model_sampling")
        self.samplers: Any = importlib.import_module("comfy.samplers")
        self.flux2: Any = importlib.import_module("comfy_extras.nodes_flux")

    def grid(self, scheduler: str, steps: int, shift: float = 1.0, mu: float | None = None) -> list[float]:
        """A scheduler's levels without the zero, on a flow with a shift or a mu."""
        kind = self.sampling.ModelSamplingDiscreteFlow if mu is None else self.sampling.ModelSamplingFlux
        flow = kind()
        flow.set_parameters(shift=shift if mu is None else mu)
        return self.samplers.calculate_sigmas(flow, scheduler, steps).tolist()[:-1]

    def ksampler(self, scheduler: str, sampler: str, steps: int, shift: float) -> list[float]:
        """As KSampler asks for it: some samplers get a step more, whose last level but one is left out."""
        if sampler in self.samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS:
            return self.grid(scheduler, steps + 1, shift)[:-1]
        return self.grid(scheduler, steps, shift)

    def empirical(self, steps: int, size: tuple[int, int]) -> list[float]:
        """Flux2Scheduler's levels."""
        return self.flux2.get_schedule(steps, round(size[0] * size[1] / 256)).tolist()[:-1]


@dataclass(frozen=True)
class Stock:
    """What ComfyUI's own nodes do with a student.

    key, steps: of the preset; a number of steps that it has not is that of its second stage. made: the levels that are
    visited. size: width and height, where the student's levels follow it.
    """

    key: str
    steps: int
    recipe: str
    made: Callable[[Core], list[float]]
    size: tuple[int, int] = (1024, 1024)


STOCK = (
    Stock("flux2_dev_turbo", 8, "Flux2Scheduler, 8 steps", lambda c: c.empirical(8, (1024, 1024))),
    Stock("flux2_dev_turbo", 8, "the card's list in ManualSigmas", lambda c: [
        1.0, 0.6509, 0.4374, 0.2932, 0.1893, 0.1108, 0.0495, 0.0003]),
    Stock("sd35_large_turbo", 4, "simple, shift 3", lambda c: c.grid("simple", 4, 3)),
    Stock("sd35_large_turbo", 4, "normal, shift 3", lambda c: c.grid("normal", 4, 3)),
    Stock("qwen_image_21_turbo", 8, "simple, mu 0.69", lambda c: c.grid("simple", 8, mu=0.69)),
    Stock("fastwan", 3, "simple, shift 8", lambda c: c.grid("simple", 3, 8)),
    Stock("fastwan", 3, "simple, shift 5", lambda c: c.grid("simple", 3, 5)),
    Stock("boogu_turbo", 4, "sgm_uniform, shift 3.16", lambda c: c.grid("sgm_uniform", 4, 3.16)),
    Stock("qwen_image_21_viggle", 6, "simple, mu 0.69", lambda c: c.grid("simple", 6, mu=0.69)),
    Stock("qwen_image_21_pruna", 5, "simple, mu 0.69", lambda c: c.grid("simple", 5, mu=0.69)),
    Stock("sfwan22", 8, "simple, shift 5", lambda c: c.grid("simple", 8, 5)),
    Stock("wan22_lightx2v_t2v", 4, "KSampler uni_pc, simple, shift 8", lambda c: c.ksampler("simple", "uni_pc", 4, 8)),
    Stock("wan21_lightx2v", 4, "KSampler uni_pc, simple, shift 5", lambda c: c.ksampler("simple", "uni_pc", 4, 5)),
    Stock("wan21_causvid", 4, "KSampler uni_pc, simple, shift 8", lambda c: c.ksampler("simple", "uni_pc", 4, 8)),
    Stock("chronoedit_distill", 8, "KSampler uni_pc, simple, 4 steps, shift 5",
          lambda c: c.ksampler("simple", "uni_pc", 4, 5)),
    Stock("minimax_h3_turbo_768p", 4, "simple, the family's shift 12", lambda c: c.grid("simple", 4, 12)),
    Stock("fasthunyuan", 6, "simple, the family's shift 7", lambda c: c.grid("simple", 6, 7)),
    Stock("wan21_lightx2v", 4, "simple, shift 8", lambda c: c.grid("simple", 4, 8)),
    Stock("ernie_image_turbo", 8, "simple, the family's shift 3", lambda c: c.grid("simple", 8, 3)),
    Stock("hunyuanvideo15_lightx2v", 4, "simple, the family's shift 7", lambda c: c.grid("simple", 4, 7)),
    Stock("flux2_klein", 4, "KSampler simple, the family's mu 2.02", lambda c: c.grid("simple", 4, mu=2.02)),
    Stock("flux2_klein", 4, "Flux2Scheduler, 4 steps", lambda c: c.empirical(4, (1024, 1024))),
    Stock("ltx2_distilled", 3, "the template's list of the second stage", lambda c: [0.85, 0.725, 0.421875]),
    Stock("pid_4step", 4, "simple, the family's shift 1.5", lambda c: c.grid("simple", 4, 1.5)),
    Stock("rcm_wan_t2v", 4, "simple, shift 5", lambda c: c.grid("simple", 4, 5)),
    Stock("qwen_image_21_lightning", 4, "simple, mu 0.69", lambda c: c.grid("simple", 4, mu=0.69), (1328, 1328)),
    Stock("qwen_image_21_lightning", 4, "simple, mu 0.69", lambda c: c.grid("simple", 4, mu=0.69), (1536, 1536)),
    Stock("qwen_image_21_lightning", 4, "simple, mu 0.69", lambda c: c.grid("simple", 4, mu=0.69), (2048, 2048)),
    Stock("qwen_image_lightning", 4, "simple, the family's mu 1.15", lambda c: c.grid("simple", 4, mu=1.15)),
    Stock("qwen_image_lightning", 8, "simple, shift 3.1", lambda c: c.grid("simple", 8, 3.1)),
    Stock("z_image_turbo", 8, "res_multistep, simple, shift 3", lambda c: c.grid("simple", 8, 3)),
    Stock("minimax_h3_turbo", 8, "res_multistep, simple, 6 steps, shift 12", lambda c: c.grid("simple", 6, 12)),
    Stock("fasth3_v2", 8, "res_multistep, simple, shift 10", lambda c: c.grid("simple", 8, 10)),
    Stock("wan_animate2_distill", 10, "lcm, simple, shift 5", lambda c: c.grid("simple", 10, 5)),
    Stock("ltx2_distilled", 8, "linear_quadratic", lambda c: c.grid("linear_quadratic", 8)),
    Stock("hidream_o1_dev", 28, "lcm, normal, shift 3", lambda c: c.grid("normal", 28, 3)),
)  # fmt: skip


def reference(row: Stock) -> list[float]:
    """A flow's levels as its maker has them."""
    if row.size != (1024, 1024):  # Qwen-Image-2.1's
        return by_mu(0.5 + 0.4 * (row.size[0] * row.size[1] / 256 - 256) / (8192 - 256), even(row.steps))
    if (row.key, row.steps) == ("ltx2_distilled", 3):
        return LTX[-3:]
    if (row.key, row.steps) in LISTS:
        return LISTS[row.key, row.steps]
    return [t / 1000 for t in TIMESTEPS[row.key, row.steps]]


def ours(key: str, steps: int, size: tuple[int, int] = (1024, 1024)) -> list[float]:
    """A flow's levels as the preset has them."""
    preset = PRESETS[key]
    if preset.refine is not None and steps not in preset.step_counts:
        return list(preset.refine.levels)
    if preset.timesteps:
        return [t / 1000 for t in presets.timesteps(preset, steps)]
    return presets.levels(preset, steps, size).tolist()


def furthest(found: Sequence[float], trained: Sequence[float]) -> float:
    """The largest difference of two lists; of unequal ones, how far a level is from every trained one at most."""
    if len(found) == len(trained):
        return max(abs(a - b) for a, b in zip(found, trained, strict=True))
    return max(min(abs(a - b) for b in trained) for a in found)


def _numbers(levels: Sequence[float]) -> str:
    shown = list(levels) if len(levels) <= 10 else [*levels[:3], *levels[-3:]]
    text = [f"{level:.4f}".rstrip("0").rstrip(".") for level in shown]
    return " ".join(text if len(levels) <= 10 else [*text[:3], "..", *text[3:]])


def levels_table(core: Core) -> str:
    """Stock recipes and presets against the makers' lists."""
    lines = ["| preset | recipe in ComfyUI | its levels | largest difference | the preset's |", "|---|---|---|---|---|"]
    for row in STOCK:
        trained, made = reference(row), row.made(core)
        own = furthest(ours(row.key, row.steps, row.size), trained)
        at = "" if row.size == (1024, 1024) else f", {row.size[0]} x {row.size[1]}"
        lines.append(
            f"| `{row.key}`{at} | {row.recipe} | {_numbers(made)} | {furthest(made, trained):.4f} | "
            f"{'0' if own < 6e-6 else f'{own:.2g}'} |"
        )
    return "\n".join(lines)


def sizes_table(core: Core) -> str:
    """FLUX.2 klein's levels by size: the preset, Flux2Scheduler, and one grid for all sizes."""
    preset = PRESETS["flux2_klein"]
    at_1024 = ours("flux2_klein", 4)
    lines = [
        "| size | tokens | mu | the preset's levels | difference from Flux2Scheduler | from those at 1024 x 1024 |",
        "|---|---|---|---|---|---|",
    ]
    for width, height in SIZES:
        tokens = tokens_of(width, height)
        levels = presets.levels(preset, 4, (width, height)).tolist()
        core_s = furthest(levels, core.empirical(4, (width, height)))
        lines.append(
            f"| {width} x {height} | {tokens} | {preset.mu_of(4, tokens):.4f} | {_numbers(levels)} | {core_s:.1g} | "
            f"{furthest(levels, at_1024):.3f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Print the tables, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of ComfyUI, whose schedulers are asked")
    parser.add_argument("--write", action="store_true", help="put the tables into RESULTS.md")
    given = parser.parse_args()
    from ..hosts.job import enter_comfyui

    enter_comfyui(given.comfyui, None, [], ["--cpu"])
    core = Core()
    for name, table in (("student levels", levels_table(core)), ("student sizes", sizes_table(core))):
        sys.stdout.write(f"{table}\n\n")
        if given.write:
            put(RESULTS, name, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
