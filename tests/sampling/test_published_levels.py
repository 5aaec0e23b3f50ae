"""The levels of published students against the formulas and lists of their makers, as the benchmark has them."""

from __future__ import annotations

import pytest
import torch

from retort.benchmarks.students import LISTS, TIMESTEPS
from retort.sampling import presets
from retort.sampling.path import FLOW, VE, VP
from retort.sampling.presets import PRESETS
from retort.sampling.schedule import DiscreteSchedule, FlowSchedule


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
