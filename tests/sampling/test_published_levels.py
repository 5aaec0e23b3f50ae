"""The levels of published students against the formulas and lists of their makers, written down once more by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from retort.sampling import presets
from retort.sampling.path import FLOW, VE, VP
from retort.sampling.presets import PRESETS
from retort.sampling.schedule import DiscreteSchedule, FlowSchedule


def S(shift, n):
    """Even times behind a shift, exactly."""
    s = Fraction(shift)
    return [float(s * x / (1 + (s - 1) * x)) for x in (Fraction(n - k, n) for k in range(n))]


def E(mu, times):
    """Times behind mu, in double precision."""
    return [math.exp(mu) / (math.exp(mu) + 1 / x - 1) for x in times]


def even(n):
    return [(n - k) / n for k in range(n)]


def twice(shift, n):
    """n levels, even from the highest to the lowest of a table of 1000 that is shifted, shifted once more."""
    low = shift * 0.001 / (1 + (shift - 1) * 0.001)
    times = [1 - (1 - low) * k / (n - 1) for k in range(n)]
    return [shift * x / (1 + (shift - 1) * x) for x in times]


LTX = [1, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875]
QWEN21 = 0.5 + 0.4 * (4096 - 256) / (8192 - 256)
KLEIN = 2.2912  # of four steps on 4096 tokens
LISTS = {
    ("minimax_h3_turbo", 8): S(12, 8),
    ("minimax_h3_turbo", 4): [1, 0.97297, 0.92308, 0.8],
    ("minimax_h3_turbo_768p", 4): [1, 0.94737, 0.85714, 0.66667],
    ("ltx2_distilled", 8): LTX,
    ("ltx25_distilled", 8): LTX,
    ("z_image_turbo", 8): [1, 0.95455, 0.9, 0.83333, 0.75, 0.64286, 0.5, 0.3],
    ("wan22_lightx2v_t2v", 4): [1, 0.9375, 0.83333, 0.625],
    ("wan22_lightx2v_t2v", 8): S(5, 8),
    ("wan22_lightx2v_i2v", 4): S(5, 4),
    ("wan22_lightx2v_i2v", 8): [1, 0.97222, 0.9375, 0.89286, 0.83333, 0.75, 0.625, 0.41667],
    ("krea2_turbo", 8): [1, 0.95672, 0.90453, 0.84035, 0.75951, 0.65457, 0.51284, 0.3109],
    ("qwen_image_lightning", 4): [1, 0.9, 0.75, 0.5],
    ("qwen_image_lightning", 8): S(3, 8),
    ("qwen_image_flash", 4): S(3, 4),
    ("qwen_image_21_turbo", 8): [1, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568],
    ("qwen_image_21_lightning", 4): [1, 0.85719, 0.66676, 0.4001],
    ("qwen_image_21_viggle", 6): E(QWEN21, [1, 0.9375, 0.875, 0.75, 0.5, 0.25]),
    ("qwen_image_21_pruna", 8): [1, 0.93333, 0.85714, 0.76923, 0.66667, 0.54545, 0.4, 0.22222],
    ("qwen_image_21_pruna", 5): [1, 0.94, 0.85714, 0.66667, 0.4],
    ("fasth3_v2", 8): [0.9999, 0.98579, 0.96758, 0.94317, 0.90909, 0.85714, 0.76923, 0.58824],
    ("fasth3", 8): [1, 0.98824, 0.97297, 0.95238, 0.92308, 0.87805, 0.8, 0.63158],
    ("fasth3", 4): S(12, 4),
    ("flux2_klein", 4): [1, 0.96738, 0.90814, 0.7672],
    ("flux2_klein_rdm", 1): [1],
    ("flux2_dev_turbo", 8): [1, 0.94743, 0.8825, 0.80028, 0.6928, 0.54632, 0.33489, 0.00299],
    ("wan21_lightx2v", 4): S(5, 4),
    ("wan21_causvid", 9): [0.999, 0.934, 0.862, 0.756, 0.603, 0.41, 0.25, 0.14, 0.074],
    ("wan21_causvid", 4): [0.999, 0.934, 0.862, 0.756],
    ("fastwan", 3): [1, 0.757, 0.522],
    ("sfwan22", 8): [1, 0.98551, 0.96552, 0.93617, 0.86598, 0.81988, 0.75, 0.63158],
    ("rcm_wan_t2v", 4): [0.98765, 0.93378, 0.8529, 0.60898],
    ("rcm_wan_i2v", 4): [0.99502, 0.93378, 0.8529, 0.60898],
    ("chronoedit_distill", 8): S(2, 8),
    ("acestep15_turbo", 8): S(3, 8),
    ("hunyuanvideo15_distilled", 8): [1, 0.98, 0.95455, 0.92105, 0.875, 0.80769, 0.7, 0.5],
    ("hunyuanvideo15_distilled", 12): S(7, 12),
    ("hunyuanvideo15_lightx2v", 4): S(5, 4),
    ("hunyuanvideo15_sr", 6): S(2, 6),
    ("hunyuanvideo15_sr", 8): S(2, 8),
    ("flux_schnell", 1): [1],
    ("flux_schnell", 2): [1, 0.5],
    ("flux_schnell", 3): S(1, 3),
    ("flux_schnell", 4): [1, 0.75, 0.5, 0.25],
    ("hyper_flux", 8): E(1.15, even(8)),
    ("hyper_flux", 16): E(1.15, even(16)),
    ("flux_turbo_alpha", 8): E(1.15, even(8)),
    ("ernie_image_turbo", 8): [1, 0.96552, 0.92308, 0.86957, 0.8, 0.70588, 0.57143, 0.36364],
    ("boogu_turbo", 4): [0.999, 0.749, 0.5, 0.25],
    ("hidream_i1_fast", 16): twice(3, 16),
    ("hidream_i1_dev", 28): twice(6, 28),
    ("mage_flow_turbo", 4): S(6, 4),
    ("pid_4step", 4): [0.999, 0.866, 0.634, 0.342],
    ("sd35_large_turbo", 4): [1, 0.85769, 0.60215, 0.00893],
    ("flash_sd3", 4): twice(3, 4),
    ("fasthunyuan", 6): [1, 0.98837, 0.97143, 0.94444, 0.89474, 0.77273],
    ("ltxv_098_distilled", 7): [1, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725],
    ("z_image_fun_distill", 8): S(3, 8),
    ("z_image_fun_distill", 4): S(3, 4),
    ("z_image_fun_distill", 2): [1, 0.75],
    ("tdm_r1_z_image", 4): S(3, 4),
}
# Whole timesteps.
O1 = (
    999, 987, 974, 960, 945, 929, 913, 895, 877, 857, 836, 814, 790, 764, 737, 707, 675, 640, 602, 560, 515, 464, 409,
    347, 278, 199, 110, 8,
)  # fmt: skip
TIMESTEPS = {
    ("wan_animate2_distill", 10): tuple(int(1000 * level) for level in S(5, 10)),
    ("hidream_o1_dev", 28): O1,
    ("hyper_sdxl_1step", 1): (800,),
    ("hyper_sd", 4): (999, 749, 499, 249),
    ("turbo", 4): (999, 899, 799, 699),
    ("turbo", 1): (999,),
    ("nitrosd_realism", 3): (999, 749, 499),
    ("flash", 4): (999, 759, 499, 259),
}


@pytest.mark.parametrize(("key", "steps"), [*LISTS])
def test_a_flow_s_levels_are_its_maker_s(key, steps):
    """To 1e-6 where a formula gives them, and else to the last of the digits that are published."""
    expected = LISTS[key, steps]
    published = any(round(level, 5) == level and round(level, 4) != level for level in expected)
    tolerance = 6e-6 if published or key == "flux2_klein" else 1e-6
    assert presets.levels(PRESETS[key], steps).tolist() == pytest.approx(expected, rel=0, abs=tolerance)


@pytest.mark.parametrize(("key", "steps"), [*TIMESTEPS])
def test_whole_timesteps_are_their_maker_s(key, steps):
    assert presets.timesteps(PRESETS[key], steps) == TIMESTEPS[key, steps]


def test_every_list_of_levels_is_among_them():
    """So that a row that is added is written down here too."""
    ours = {(key, n) for key, preset in PRESETS.items() if not preset.timesteps for n in preset.step_counts}
    assert ours <= set(LISTS)


@pytest.mark.parametrize("key", ["tcd", "hyper_sd_unified"])
def test_tcd_s_grid_is_the_lcm_scheduler_s(key):
    for steps in PRESETS[key].step_counts:
        assert presets.timesteps(PRESETS[key], steps) == tuple(999 - 20 * (50 * k // steps) for k in range(steps))


@pytest.mark.parametrize("key", ["hyper_sd", "hyper_sd_cfg", "pcm_smallcfg"])
def test_trailing_grids_are_ddim_s(key):
    for steps in PRESETS[key].step_counts:
        assert presets.timesteps(PRESETS[key], steps) == tuple(round(1000 - 1000 * k / steps) - 1 for k in range(steps))


def test_the_second_stages_are_the_ends_of_the_first():
    assert PRESETS["ltx2_distilled"].refine.levels == (0.909375, 0.725, 0.421875)
    assert PRESETS["ltxv_098_distilled"].refine.levels == (0.9094, 0.725, 0.4219)


def test_a_student_s_shift_is_set_beside_its_levels():
    """What ComfyUI counts in percentages, and the sound of H3, then follow the student."""
    for key, shift, sound in (("minimax_h3_turbo_768p", 6, 3), ("fasthunyuan", 17, None), ("z_image_turbo", 3, None)):
        assert (PRESETS[key].shift, PRESETS[key].audio_shift) == (shift, sound)


SD, COG = DiscreteSchedule(), DiscreteSchedule(zsnr=True)


@pytest.mark.parametrize(
    ("key", "denoise", "kept"),
    [
        ("qwen_image_lightning", 0.5, [0.75, 0.5]),  # S(3, .5) is .75
        ("qwen_image_lightning", 0.75, [0.9, 0.75, 0.5]),
        ("qwen_image_lightning", 0.99, [1, 0.9, 0.75, 0.5]),
        ("qwen_image_lightning", 0.05, [0.5]),
        ("wan21_lightx2v", 0.5, [0.83333, 0.625]),
        ("sd35_large_turbo", 0.3, [0.60215, 0.00893]),
        ("flux2_klein", 0.6, [0.90814, 0.7672]),
        ("flux2_klein_rdm", 0.2, [1]),
        ("ltx2_distilled", 0.5, [0.421875]),  # of a model without a shift
        ("boogu_turbo", 0.7, [0.749, 0.5, 0.25]),
    ],
)
def test_image_to_image_begins_at_the_trained_level_that_is_nearest(key, denoise, kept):
    preset, schedule = PRESETS[key], FlowSchedule()
    whole = presets.sigmas(preset, None, schedule, FLOW)
    part = presets.cut(preset, whole, denoise, schedule, FLOW)
    assert part.tolist() == pytest.approx([*kept, 0], abs=1e-5)
    assert torch.equal(part, whole[-len(part) :])


def test_a_list_without_a_shift_is_cut_by_the_model_s_own():
    preset, schedule = PRESETS["ltx2_distilled"], FlowSchedule(2.37)
    whole = presets.sigmas(preset, None, schedule, FLOW)
    # 2.37 * .5 / (1 + 1.37 * .5) is .703
    assert presets.cut(preset, whole, 0.5, schedule, FLOW).tolist() == pytest.approx([0.725, 0.421875, 0])


@pytest.mark.parametrize(("path", "schedule", "key"), [(VE, SD, "lightning_sdxl"), (VP, COG, "tdm_cogvideox_2b")])
def test_a_table_is_cut_at_the_nearest_timestep(path, schedule, key):
    preset = PRESETS[key]
    whole, trained = presets.sigmas(preset, 4, schedule, path), presets.timesteps(preset, 4)
    for tenths in range(1, 10):
        part = presets.cut(preset, whole, tenths / 10, schedule, path)
        first = int(schedule.timestep(part[:1]))
        assert abs(first - 99.9 * tenths) <= min(abs(t - 99.9 * tenths) for t in trained) + 1
        assert torch.equal(part, whole[-len(part) :])


def test_what_a_grid_is_called():
    schedule = FlowSchedule(3.0)
    grid = presets.sigmas(PRESETS["wan21_lightx2v"], None, schedule, FLOW)
    assert presets.told(grid, schedule, FLOW) == "1, 0.9375, 0.83333, 0.625"
    table = presets.sigmas(PRESETS["lcm"], 4, SD, VE)
    assert presets.told(table, SD, VE) == "999, 759, 499, 259"
