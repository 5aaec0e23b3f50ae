"""The user's own presets: one file each, listed by the nodes when it is there, and harmless whatever it holds."""

from __future__ import annotations

import json
import logging
import os
import re

import pytest

from retort.hosts import presets
from retort.hosts.headless.host import host
from retort.nodes.distilled import RetortDistilledSampler, RetortDistilledSetup, RetortDistilledSigmas
from retort.nodes.load_student import RetortLoadStudent
from retort.sampling.presets import PRESETS

ROW = {"title": "Mine", "family": "flow", "steps": [4], "shift": 3, "mode": "deterministic"}


@pytest.fixture
def folder(where):
    place = where.models[0] / "retort" / "presets"
    place.mkdir(parents=True)
    presets._read.cache_clear()
    return place


def write(folder, name, row):
    (folder / name).write_text(row if isinstance(row, str) else json.dumps(row), encoding="utf-8")


def options(node):
    return next(one.options for one in node.GET_SCHEMA().inputs if one.id == "preset")


def test_a_file_is_listed_by_every_node_once_it_is_there_and_gone_with_it(folder):
    nodes = (RetortDistilledSetup, RetortDistilledSigmas, RetortDistilledSampler)
    assert all("mine" not in options(node) for node in nodes)
    write(folder, "mine.json", ROW)
    assert all(list(options(node))[-1] == "mine" for node in nodes)
    assert presets.named("mine", host.presets_folders()).title == "Mine"
    (folder / "mine.json").unlink()
    assert all("mine" not in options(node) for node in nodes)
    with pytest.raises(ValueError, match="preset 'mine' is not known: put mine.json into models/retort/presets"):
        presets.named("mine", host.presets_folders())


def test_a_file_that_changes_is_read_again(folder):
    write(folder, "mine.json", ROW)
    assert presets.known([folder])["mine"].step_counts == (4,)
    write(folder, "mine.json", ROW | {"steps": [8, 4], "note": "longer"})
    assert presets.known([folder])["mine"].step_counts == (8, 4)


NODES = (RetortDistilledSetup, RetortDistilledSigmas, RetortDistilledSampler)


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_a_node_runs_again_once_its_preset_is_edited(folder, node):
    """What a host keeps of a node that ran before is given anew only when this is another value."""
    write(folder, "mine.json", ROW)
    write(folder, "other.json", ROW)
    asked = ("mine", "other", "auto", None, "dmd2_sdxl_4step", "custom")
    before = {name: node.fingerprint_inputs(preset=name, steps=0) for name in asked}
    assert before == {name: node.fingerprint_inputs(preset=name, steps=0) for name in asked}
    write(folder, "mine.json", ROW | {"steps": [2]})
    after = {name: node.fingerprint_inputs(preset=name, steps=0) for name in asked}
    assert [name for name in asked if before[name] != after[name]] == ["mine", "auto", None]


def test_a_students_lora_is_loaded_again_once_file_or_presets_change(folder, where):
    lora = where.models[0] / "loras" / "mine.safetensors"
    lora.parent.mkdir()
    lora.write_bytes(b"one")

    def now():
        return RetortLoadStudent.fingerprint_inputs(lora_name="mine.safetensors", strength=1.0)

    seen = [now()]
    assert now() == seen[0]
    lora.write_bytes(b"longer")
    seen.append(now())
    os.utime(lora, ns=(1, 1))
    seen.append(now())
    write(folder, "mine.json", ROW | {"files": ["mine*"]})
    seen.append(now())
    assert len({*seen}) == 4
    # A connected name is not known before it runs.
    assert RetortLoadStudent.fingerprint_inputs(strength=1.0) != RetortLoadStudent.fingerprint_inputs(strength=1.0)


def test_of_two_folders_the_first_counts_and_a_missing_one_is_empty(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    write(folder, "mine.json", ROW)
    write(other, "mine.json", ROW | {"title": "Other"})
    write(other, "second.json", ROW | {"title": "Second"})
    found = presets.known([tmp_path / "nowhere", folder, other])
    assert (found["mine"].title, found["second"].title) == ("Mine", "Second")


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("lcm.json", ROW, "Retort has a preset 'lcm' of its own: rename the file"),
        ("custom.json", ROW, "of its own"),
        ("auto.json", ROW, "of its own"),
        ("Mine.json", ROW, "a key has up to 64 of the characters"),
        ("a b.json", ROW, "a key has up to 64 of the characters"),
        ("x.json", "{", "it is no JSON"),
        ("x.json", "", "it is no JSON"),
        ("x.json", '{"title": "a", "title": "b"}', "title is given twice"),
        ("x.json", '{"shift": NaN}', "NaN is no number"),
        ("x.json", '{"shift": 1e999}', "too large"),
        ("x.json", '{"steps": [' + "9" * 5000 + "]}", "too large"),
        ("x.json", "[" * 5000, "it is"),
        ("x.json", "[" * 40 + "]" * 40, "nested too deep"),
        ("x.json", '{"note": "' + "x" * presets.MOST_BYTES + '"}', "larger than 65536 bytes"),
        ("x.json", '"\\ud800"', "half a character"),
        ("x.json", [1, 2], "no object of fields"),
        ("x.json", ROW | {"steps": [0]}, "steps is \\[0\\]; a step count is a whole number from 1 to 100"),
        ("x.json", ROW | {"\x1b]0;title\x07": 1}, "is no field"),
    ],
)
def test_a_bad_file_is_one_warning_with_file_field_and_remedy(folder, caplog, name, row, said):
    write(folder, name, row)
    with caplog.at_level(logging.WARNING, "retort"):
        for _ in range(3):
            assert presets.known([folder]) == PRESETS
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and name in record.getMessage()
    assert re.search(said, record.getMessage())
    assert "\x1b" not in record.getMessage()


def test_a_file_that_cannot_be_read_is_a_warning_too(folder, caplog):
    (folder / "folder.json").mkdir()
    (folder / "dead.json").symlink_to(folder / "nothing")
    (folder / "bytes.json").write_bytes(b"\xff\xfe\x00\x01")
    with caplog.at_level(logging.WARNING, "retort"):
        assert presets.known([folder]) == PRESETS
    assert len(caplog.records) == 1 and "bytes.json" in caplog.text
