"""Presets as JSON: what is written is read again, and whatever a stranger wrote is a preset or names its field."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from retort.sampling import presets
from retort.sampling.path import FLOW
from retort.sampling.presets import PRESETS, PresetMismatch
from retort.sampling.schedule import FlowSchedule, FluxSchedule
from retort.sampling.students.form import from_json, to_json
from retort.sampling.students.preset import Preset, Refine, tokens_of

STUDENTS = Path(presets.__file__).parent / "students"
ROW = {"title": "A flow student", "family": "flow", "steps": [4, 8], "shift": 5, "mode": "deterministic"}
FULL = ROW | {
    "mode": "renoise", "paths": ["FLOW"], "eta": 0.3, "label_scale": 0.25, "noise_scale": 7.5, "clip": 2.5,
    "start": "noised", "frames_per_block": 3,
    "refine": {"levels": [0.909375, 0.725], "mode": "renoise"}, "boundary": 0.875, "audio_shift": 3, "cfg": 2,
    "guidance": 3.5, "lora_strength": 0.125, "latent_channels": 16, "latent_dims": 3, "architectures": ["WAN21_T2V"],
    "files": ["wan2.?_t2v*"], "note": "Somewhere.", "source": "Someone", "certainty": "maker",
}  # fmt: skip


def flow(**fields):
    return from_json({"title": "x", "family": "flow"} | fields, "x")


def test_every_row_of_ours_is_what_it_is_written_as_and_its_key_is_its_file_s_name():
    files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in STUDENTS.glob("*.json")}
    assert [*PRESETS] == [*sorted(files), "custom"]
    for key, row in files.items():
        assert from_json(to_json(PRESETS[key]), key) == PRESETS[key] == from_json(row, key)
        assert set(to_json(PRESETS[key])) <= set(row)


def test_every_field_survives_the_way_through_json():
    preset = from_json(json.loads(json.dumps(FULL)), "mine")
    assert preset.refine == Refine((0.909375, 0.725), "renoise") and preset.step_counts == (4, 8)
    assert from_json(json.loads(json.dumps(to_json(preset))), "mine") == preset
    uneven = flow(unshifted=[[1, 0.9, 0.5]], mu=[256, 0.5, 8192, 0.9])
    assert from_json(json.loads(json.dumps(to_json(uneven))), "x") == uneven
    assert set(FULL) | {"levels", "timesteps", "unshifted", "sigmas", "mu"} - {"key"} == set(
        name for name in (*vars(preset), "steps") if name not in ("key",)
    )


@pytest.mark.parametrize("schedule", [FlowSchedule(), FlowSchedule(5.0, 1.0), FluxSchedule(2.02)])
def test_levels_are_what_the_network_is_told_whatever_the_model_s_shift(schedule):
    """In units of the network's timesteps, which count to 1000 or to 1; first levels below 1 among them."""
    for preset in (flow(levels=[[0.98765, 0.93378, 0.8529, 0.60898]]), flow(steps=[4], shift=12)):
        grid = presets.sigmas(preset, None, schedule, FLOW)
        told = schedule.timestep(grid[:-1]) / float(schedule.timestep(torch.tensor(1.0)))
        torch.testing.assert_close(told, presets.levels(preset), rtol=0, atol=1e-6)
        assert presets.start_level(preset, schedule, FLOW) == float(grid[0]) and float(grid[-1]) == 0


def test_a_shift_bends_even_and_uneven_times_by_its_formula():
    for steps in (2, 3, 4, 6, 8, 10):
        x = [k / steps for k in range(steps, 0, -1)]
        preset = flow(steps=[steps], shift=5)
        assert presets.levels(preset).tolist() == pytest.approx([5 * t / (1 + 4 * t) for t in x], abs=1e-6)
    preset = flow(unshifted=[[0.999, 0.874, 0.5]], shift=10)
    assert presets.levels(preset).tolist() == pytest.approx([10 * t / (1 + 9 * t) for t in (0.999, 0.874, 0.5)])
    assert presets.levels(flow(steps=[4], shift=1)).tolist() == [1, 0.75, 0.5, 0.25]


def test_mu_is_a_shift_of_its_exponential_and_may_follow_the_size():
    fixed, line = flow(steps=[8], mu=1.15), flow(steps=[4], mu=[256, 0.5, 8192, 0.9])
    shift = flow(steps=[8], shift=math.exp(1.15))
    torch.testing.assert_close(presets.levels(fixed), presets.levels(shift), rtol=0, atol=1e-6)
    assert not fixed.sized and line.sized
    for side, mu in ((1024, 0.69355), (1328, 0.83432), (2048, 1.31290)):
        s = math.exp(mu)
        expected = [s * x / (1 + (s - 1) * x) for x in (1, 0.75, 0.5, 0.25)]
        assert presets.levels(line, None, (side, side)).tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(presets.levels(line), presets.levels(line, None, (1024, 1024)))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1024, 1024), (1, 0.9674, 0.9081, 0.7672)),
        ((1056, 1056), (1, 0.9083, 0.7675, 0.5238)),
        ((1536, 1536), (1, 0.9575, 0.8825, 0.7146)),
        ((2048, 2048), (1, 0.987, 0.9619, 0.8939)),
    ],
)
def test_flux2_s_empirical_mu_falls_above_4300_tokens(size, expected):
    preset = flow(steps=[4], mu="bfl")
    assert presets.levels(preset, 4, size).tolist() == pytest.approx(expected, abs=5e-5)
    assert preset.mu_of(4, 4300) == pytest.approx(2.308, abs=1e-3) and preset.mu_of(4, 4301) == pytest.approx(
        1.185, abs=1e-3
    )
    assert tokens_of(1056, 1056) == 4356


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [
        ("timesteps", [[1.5]], "whole number"),
        ("timesteps", [[True]], "whole number"),
        ("timesteps", [[10**30]], "whole number"),
        ("timesteps", [], "list of 1 to"),
        ("timesteps", "999", "list of 1 to"),
        ("timesteps", [[1]] * 101, "list of 1 to 100"),
        ("timesteps", [list(range(999, 898, -1))], "list of 1 to 100"),
        ("levels", [[1.0, math.nan]], "use a number"),
        ("levels", [[math.inf]], "use a number"),
        ("levels", [[1.0, "0.5"]], "use a number"),
        ("levels", [[1.5, 0.5]], "up to 1 and at least 1e-06"),
        ("levels", [[1.0, 1e-46]], "at least 1e-06"),
        ("levels", [[0.5, 0.5 - 1e-9]], "float32 tells them apart"),
        ("refine", {"levels": [1.0, 9e-7]}, "at least 1e-06"),
        ("levels", [[0.5, 0.9]], "from high to low"),
        ("levels", [[1, 0]], "at least 1e-06"),
        ("steps", [0], "from 1 to 100"),
        ("steps", [4, 4], "each step count once"),
        ("steps", [1000], "from 1 to 100"),
        ("shift", -1, "positive number"),
        ("shift", 10**400, "use a number"),
        ("shift", {}, "use a number"),
        ("mu", "flux", "'bfl'"),
        ("mu", [1, 2], "two points"),
        ("mu", [256, 0.5, 256, 0.9], "two points"),
        ("mu", 1e6, "-20 .. 20"),
        ("mu", [0, 0, 1, 1e9], "at both points"),
        ("mu", [0, -21, 1, 0], "at both points"),
        ("mu", 20, "differ in float32"),
        ("mu", -20, "at least 1e-06"),
        ("eta", 2, "0 .. 1"),
        ("label_scale", 0, "above 0"),
        ("noise_scale", 0, "positive number"),
        ("clip", -1, "positive number"),
        ("boundary", 1, "between 0 and 1"),
        ("frames_per_block", 0, "1 .. 64"),
        ("frames_per_block", 1.5, "whole number"),
        ("refine", [0.9], "an object with levels"),
        ("refine", {"levels": [0.5, 0.9]}, "from high to low"),
        ("refine", {"levels": [0.9], "mode": "loud"}, "its mode is one of"),
        ("refine", {"levels": [0.9], "more": 1}, "an object with levels"),
        ("mode", ["renoise"], "one line of text"),
        ("mode", "loud", "one of renoise"),
        ("certainty", "hearsay", "one of code"),
        ("title", "two\nlines", "one line"),
        ("title", "\x1b[31mred", "one line"),
        ("title", "turned \u202e round", "one line"),
        ("title", " ", "missing"),
        ("note", "x" * 1001, "at most 1000"),
        ("files", ["../secret*"], "without folders"),
        ("files", ["*"], "without folders"),
        ("files", [3], "one line"),
        ("architectures", ["os.system"], "model classes"),
        ("latent_channels", "16", "whole number"),
        ("lora_strength", 100, "-10 .. 10"),
        ("guidance", -1, "0 .. 100"),
        ("sampler", "euler", "no field"),
        ("key", "mine", "no field"),
    ],
)
def test_what_makes_no_sense_is_refused_by_preset_and_field(field, value, remedy):
    row = {name: each for name, each in ROW.items() if field not in ("timesteps", "levels") or name != "steps"}
    row = {name: each for name, each in row.items() if field != "mu" or name != "shift"}
    with pytest.raises(ValueError, match=f"(?s)Preset 'mine'.*{field}.*{remedy}"):
        from_json(row | {field: value}, "mine")


@pytest.mark.parametrize("mu", [[256, 0.0, 257, 20.0], [256, 0.0, 257, -20.0], [0, 0.0, 1e-300, 1.0]])
def test_a_line_of_mu_that_leads_beyond_numbers_ends_in_a_sentence(mu):
    """At a size that is far from its two points; near them it has levels."""
    preset = flow(steps=[4], mu=mu)
    assert max(map(abs, (preset.mu_of(4, tokens) for tokens in (0, 256, 10**9)))) <= 20
    with pytest.raises(PresetMismatch, match="has no levels for 1024 x 1024 pixels"):
        presets.levels(preset)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1], "no object of fields"),
        ("x", "no object of fields"),
        ({}, "title is missing"),
        ({"title": "x"}, "family is missing"),
        ({"title": "x", "family": "flow"}, "timesteps is missing"),
        (ROW | {"levels": [[1.0]]}, "exclude one another"),
        (ROW | {"unshifted": [[1.0]]}, "exclude one another"),
        (ROW | {"mu": 1.0}, "not both"),
        ({**ROW, "shift": None}, "give a shift or a mu"),
        ({"title": "x", "family": "flow", "levels": [[1.0]], "mu": 1.0}, "mu is 1.0; give the steps"),
        ({"title": "x", "family": "flow", "unshifted": [[0.9]], "mu": "bfl"}, "begin at 1"),
        ({"title": "x", "family": "eps", "levels": [[1.0]]}, "only a student of family 'flow'"),
        ({"title": "x", "family": "eps", "timesteps": [[999]], "boundary": 0.9}, "only a student of family 'flow'"),
        (ROW | {"mode": "single"}, "exactly one call"),
        (ROW | {"sigmas": [[80.0]]}, "exclude one another"),
        ({"title": "x", "family": "flow", "sigmas": [[80.0]]}, "sigmas is .*; a flow's levels stand in levels"),
        ({"title": "x", "family": "edm", "sigmas": [[1.0, 80.0]]}, "sigmas is .*from high to low"),
        ({"title": "x", "family": "edm", "sigmas": [[80.0]], "frames_per_block": 1}, "only a student of family 'flow'"),
        (ROW | {"frames_per_block": 3}, "blocks of frames are sampled by 'renoise' alone"),
    ],
)
def test_what_does_not_go_together_is_refused(row, said):
    with pytest.raises(ValueError, match=f"Preset 'mine': .*{said}"):
        from_json(row, "mine")


@pytest.mark.parametrize("key", ["", "../up", "a/b", "A", "x" * 65, "a b", "a\n", "ключ"])
def test_a_key_is_no_path(key):
    with pytest.raises(ValueError, match="a key has up to 64 of the characters"):
        from_json(ROW, key)


def test_untrained_counts_are_refused_for_levels_too():
    with pytest.raises(PresetMismatch, match="steps is 6, and 'A flow student' was trained for 4, 8"):
        presets.levels(from_json(ROW, "mine"), 6)


def test_a_preset_of_code_and_one_of_a_file_are_equal():
    assert from_json(ROW, "mine") == Preset(
        "mine", "A flow student", "flow", mode="deterministic", shift=5.0,
        unshifted=((1.0, 0.75, 0.5, 0.25), (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)),
    )  # fmt: skip
    assert replace(from_json(ROW, "mine"), key="other").key == "other"
