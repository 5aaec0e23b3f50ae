"""Presets: published grids by their schedulers' own formulas, exact integers, and every mismatch with its remedy."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from retort.sampling import presets
from retort.sampling.path import FLOW, VE, NoisePath
from retort.sampling.presets import PRESETS, Preset, PresetMismatch, check, custom, parse_timesteps
from retort.sampling.schedule import DiscreteSchedule, FlowSchedule, FluxSchedule
from retort.sampling.students.files import is_base, matching

SD = DiscreteSchedule()


def grid(key, steps=None):
    return presets.timesteps(PRESETS[key], steps)


def test_keys_and_titles_are_unique():
    assert all(key == preset.key for key, preset in PRESETS.items())
    assert len({preset.title for preset in PRESETS.values()}) == len(PRESETS)
    assert all(preset.note and (preset.source or key == "custom") for key, preset in PRESETS.items())


def test_published_grids():
    assert grid("dmd2_sdxl_4step") == (999, 749, 499, 249)
    assert grid("dmd2_sdxl_1step") == grid("di_star_sdxl_1step") == (399,)
    assert grid("dmd2_sd15_1step") == (999,)
    assert grid("tdm_cogvideox_2b") == (999, 856, 665, 399)
    assert grid("instarevive") == (400,)


@pytest.mark.parametrize("steps", range(1, 9))
def test_lcm_grid_is_the_lcm_scheduler_s(steps):
    """Timesteps 999, 979, .. 19 of the teacher, of which index floor(50 k / steps) is visited."""
    assert grid("lcm", steps) == tuple(999 - 20 * (50 * k // steps) for k in range(steps))


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_lightning_grid_is_trailing(steps):
    assert grid("lightning_sdxl", steps) == tuple(round(1000 - 1000 / steps * k) - 1 for k in range(steps))


def test_tdm_grids_are_the_dpm_solver_s():
    """SD3: linspace(1, 1/1000) levels shifted by 6, truncated to integers. SD1.5: linspace(0, 999, 5), rounded."""
    levels = [(1 - 0.001) * (1 - k / 4) for k in range(4)]
    assert grid("tdm_sd3") == tuple(int(1000 * 6 * s / (1 + 5 * s)) for s in levels)
    assert grid("tdm_sd15") == tuple(round(999 * (1 - k / 4)) for k in range(4))


@pytest.mark.parametrize("schedule", [FlowSchedule(), FlowSchedule(6.0), FlowSchedule(3.0, 1.0), FluxSchedule()])
def test_every_integer_is_reachable_on_a_flow(schedule):
    unit = float(schedule.timestep(torch.tensor(1.0)))
    reached = 0
    for t in range(1, 1001):
        sigmas = presets.sigmas(custom(str(t), highest=1000), 1, schedule, FLOW)
        assert float(sigmas[0]) == float(torch.tensor(t / 1000))
        timestep = float(schedule.timestep(sigmas[0]))
        assert timestep == pytest.approx(t / 1000 * unit, rel=2**-23)
        reached += timestep == float(torch.tensor(t / 1000 * unit))
    assert reached == (990 if unit == 1000 else 1000)


def test_the_embedded_students_grids_are_those_that_they_are_trained_on():
    """As `trainers.objectives.parts.grids.student_sigmas` makes them: even levels behind the model's shift."""
    levels = torch.arange(4, 0, -1) / 4
    for key, steps in (("digits_flow", 4), ("digits_flow_tdm", 4)):
        shifted = 3 * levels / (1 + 2 * levels)
        torch.testing.assert_close(presets.sigmas(PRESETS[key], steps, FlowSchedule(3.0), FLOW)[:-1], shifted)
    assert grid("digits_flow", 1) == (1000,) and grid("digits_eps") == (399,)
    assert grid("digits_eps_tdm") == (999, 749, 499, 249)


def test_every_integer_is_reachable_on_a_table():
    everyone = custom(", ".join(str(t) for t in range(999, -1, -1)))
    sigmas = presets.sigmas(everyone, None, SD, VE)
    assert torch.equal(sigmas, torch.cat([SD.sigmas.flip(0), torch.zeros(1)]))


class Spaced:
    """A table of every 20th level that still counts timesteps to 999, as ComfyUI's LCM sampling does."""

    sigmas = SD.sigmas[19::20]
    sigma_min, sigma_max = sigmas[0], sigmas[-1]

    def timestep(self, sigma):
        return (sigma.log() - self.sigmas.log()[:, None]).abs().argmin(dim=0).view(sigma.shape) * 20 + 19

    def sigma(self, timestep):
        return self.sigmas[int((timestep - 19) / 20)]


class Linear(Spaced):
    """A table whose timesteps rise in proportion to the level, as a flow's do, though it is none."""

    sigmas = torch.arange(1, 1001) / 1000

    def timestep(self, sigma):
        return sigma * 1000 - 1

    def sigma(self, timestep):
        return (timestep + 1) / 1000


def test_a_flow_is_known_by_its_path():
    sigmas = presets.sigmas(custom("999, 499"), None, Linear(), VE)
    assert Linear().timestep(sigmas[:-1]).tolist() == [999, 499]
    assert presets.sigmas(custom("999, 499"), None, FlowSchedule(), FLOW).tolist() == pytest.approx([0.999, 0.499, 0.0])


def test_a_spaced_table_gives_its_own_timesteps_and_refuses_others():
    assert torch.equal(presets.sigmas(PRESETS["lcm"], 4, Spaced(), VE)[:-1], SD.sigmas[[999, 759, 499, 259]])
    with pytest.raises(PresetMismatch, match="needs timestep 749, and this model's noise schedule .50 levels"):
        presets.sigmas(PRESETS["dmd2_sdxl_4step"], 4, Spaced(), VE)


def test_timestep_zero_of_a_flow_is_refused():
    with pytest.raises(PresetMismatch, match="needs timestep 0"):
        presets.sigmas(custom("500, 0"), 2, FlowSchedule(), FLOW)


@pytest.mark.parametrize("steps", [0, -3])
def test_zero_steps(steps):
    with pytest.raises(PresetMismatch, match=f"steps is {steps}, so nothing would be sampled.*takes 4"):
        presets.sigmas(PRESETS["dmd2_sdxl_4step"], steps, SD, VE)


def test_untrained_step_counts_and_the_default():
    with pytest.raises(PresetMismatch, match="steps is 3, and 'SDXL Lightning' was trained for 2, 4, 8"):
        grid("lightning_sdxl", 3)
    assert len(grid("lightning_sdxl")) == 4
    with pytest.raises(PresetMismatch, match="type them"):
        grid("custom")


FITS = {"eps": ("VE", "eps", 4, 2), "v": ("VP", "v", 16, 3), "flow": ("FLOW", "flow", 16, 2)}


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_each_preset_fits_its_model_and_no_other_family(preset):
    for family, (path, prediction, channels, dims) in FITS.items():
        channels, dims = preset.latent_channels or channels, preset.latent_dims or dims
        if preset.family in (family, "any"):
            check(preset, path, prediction, channels, dims)
        else:
            with pytest.raises(PresetMismatch, match=f"this model predicts '{prediction}'"):
                check(preset, path, prediction, channels, dims)


@pytest.mark.parametrize(
    ("key", "model", "message"),
    [
        ("tdm_sd3", ("VE", "eps", 4, 2), "is for a flow model .SD3, Flux., and this model predicts 'eps'"),
        ("dmd2_sdxl_4step", ("VE", "v", 4, 2), "is for an eps model .*predicts 'v'"),
        ("dmd2_sdxl_4step", ("VE", "eps", 16, 2), "has latents of 4 channels, and this model's have 16"),
        ("dmd2_sdxl_4step", ("VE", "eps", 4, 3), "makes images, and this model's latents are for video"),
        ("tdm_cogvideox_2b", ("VE", "v", 16, 3), "runs on the noise path VP, and this model's is VE"),
        ("tdm_sd3", ("FLOW", "flow", 16, 3), "makes images, and this model's latents are for video"),
    ],
)
def test_mismatches_name_what_is_wrong_what_fits_and_the_file(key, model, message):
    with pytest.raises(PresetMismatch, match=message) as caught:
        check(PRESETS[key], *model)
    text = str(caught.value)
    assert "custom" in text and PRESETS[key].title in text and PRESETS[key].note in text
    offered = text.split("fits this one: ")[1].split(".")[0].split(", ")
    for other in offered:
        check(PRESETS[other], *model)


@pytest.mark.parametrize("text", ["999, 749, 499, 249", "999 749 499 249", "999;749,499 , 249,"])
def test_typed_timesteps(text):
    assert parse_timesteps(text) == (999, 749, 499, 249)
    preset = custom(text, "deterministic", "noised")
    assert (preset.key, preset.mode, preset.start, preset.step_counts) == ("custom", "deterministic", "noised", (4,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "timesteps is empty"),
        (" , ", "timesteps is empty"),
        ("999, x", "'x' is not a whole number"),
        ("999, 1.5", "'1.5' is not a whole number"),
        ("\u0661\u0662", "is not a whole number"),
        ("--5", "is not a whole number"),
        ("499, 749", "749 follows 499; each must be lower"),
        ("499, 499", "499 follows 499"),
        ("1000", r"1000 is outside 0 \.\. 999"),
        ("500, -1", r"-1 is outside 0 \.\. 999"),
        ("9" * 5000, r"is outside 0 \.\. 999"),
    ],
)
def test_bad_timesteps_are_named(text, message):
    with pytest.raises(PresetMismatch, match=message):
        parse_timesteps(text)


def test_flows_may_start_at_1000():
    assert parse_timesteps("1000, 500", highest=1000) == (1000, 500)


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("family", "gan", "use one of eps, v, edm, flow, any"),
        ("mode", "twice", "use one of renoise"),
        ("start", "loud", "use one of unit"),
        ("cfg", 0.0, "use a positive number"),
        ("cfg", math.nan, "use a positive number"),
        ("shift", -1.0, "use a positive number"),
        ("latent_dims", 4, "use 1 .sound., 2 .image., 3 .video."),
        ("latent_channels", 0, "use a count"),
        ("paths", ("FLOW",), "family 'eps' runs on VE"),
        ("timesteps", ((),), "needs at least one timestep"),
        ("timesteps", ((1001,),), "lie in 0 .. 1000"),
        ("timesteps", ((1, 2),), "from high to low"),
        ("timesteps", ((2, 1), (4, 3)), "give each step count once"),
    ],
)
def test_bad_fields_are_named(field, value, remedy):
    with pytest.raises(ValueError, match=f"Preset 'lcm': {field} is .*{remedy}"):
        replace(PRESETS["lcm"], **{field: value})


def test_single_presets_make_one_call():
    with pytest.raises(ValueError, match="mode 'single' makes exactly one call"):
        Preset("x", "x", "eps", ((2, 1),), "single")


def test_presets_are_frozen_and_hashable():
    assert len(set(PRESETS.values())) == len(PRESETS)
    with pytest.raises(FrozenInstanceError):
        PRESETS["lcm"].cfg = 2.0


def test_paths_are_noise_paths():
    for preset in PRESETS.values():
        for kind in preset.paths:
            NoisePath(kind)


def test_a_student_that_starts_at_several_levels_starts_at_the_highest():
    preset = replace(PRESETS["lcm"], timesteps=((399,), (999, 499)))
    assert presets.timesteps(preset) == (399,)
    assert presets.start_level(preset, SD, VE) == float(SD.sigmas[999])
    assert presets.start_level(presets.PRESETS["di_star_sdxl_1step"], SD, VE) == float(SD.sigmas[399])


def test_no_published_students_file_is_taken_for_its_base():
    names = [name.replace("*", "x").replace("?", "t") for preset in PRESETS.values() for name in preset.files]
    assert names and not [name for name in names if is_base(f"{name}.safetensors")]
    for base in ("sd_xl_base_1.0_0.9vae", "z_image_bf16", "Qwen_Image_fp8_e4m3fn", "wan2.1_i2v_480p_14B_fp16"):
        assert is_base(f"folder/{base}.safetensors") and not matching(PRESETS.values(), f"{base}.safetensors")


def test_presets_of_the_models_own_kind_are_named_first():
    with pytest.raises(PresetMismatch, match=r"this one: (\w*z_image\w*, ){3}(\w+, ){4}custom\. "):
        presets.check(PRESETS["dmd2_sdxl_4step"], "FLOW", "flow", 16, 2, "ZImage")
    with pytest.raises(PresetMismatch, match=r"this one: ((?!\w*z_image)\w+, ){7}custom\. "):
        presets.check(PRESETS["dmd2_sdxl_4step"], "FLOW", "flow", 16, 2)
