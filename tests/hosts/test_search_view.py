"""The record of a search while it goes on, and what a page is told of it."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from retort.hosts.search import record as search_record
from retort.hosts.search import view as search_view
from retort.hosts.search.record import Record
from retort.sampling.particles import BestOfConfig
from retort.sampling.path import FLOW
from retort.sampling.prior import Prior
from retort.sampling.search import search
from retort.sampling.tree import TreeConfig

SIGMAS = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])


def searched(record, config, calls=60, item=0, reward=lambda x0: -x0.flatten(1).square().mean(1)):
    from retort.sampling.accounts import Budget

    def evaluate(x0):
        rewards = reward(x0)
        record.scored(x0.movedim(1, -1)[..., :3].clamp(0, 1), [x0], rewards)
        return rewards

    prior = Prior(lambda x, sigma: x * 0.5, FLOW, SIGMAS, (4, 8, 8), batch=4)
    return search(
        prior, config, Budget(calls=calls), evaluate, seed=3, callback=lambda state: record.tell(state, item)
    )


@pytest.fixture
def records(tmp_path):
    return tmp_path / "records"


def test_a_tree_is_recorded_with_pictures_and_latents(records, tmp_path):
    with Record(records, "a seven", "mine", 1) as record:
        found = searched(record, TreeConfig(leaves=4))
    (name,) = (entry.name for entry in records.iterdir())
    listed = search_view.searches(records, tmp_path / "none", os.getpid())["searches"]
    assert [(s["name"], s["prompt"], s["reward"], s["going"]) for s in listed] == [(name, "a seven", "mine", False)]
    view = search_view.record(records, name, os.getpid())["items"][0]
    tree = view["tree"]
    assert tree["size"] == found.state.size == len(tree["parent"]) and tree["stops"] == len(found.state.stops)
    assert view["history"] == [list(pair) for pair in found.state.best.history]
    number, reward = view["kept"][0]
    assert (number, reward) == (found.best.number, pytest.approx(found.best.reward))
    # Every finished latent is one that was kept, under the number that its leaf has.
    leaves = {int(found.state.number[leaf]): leaf for leaf in found.state.leaves}
    assert {n for n, _ in view["kept"]} == set(leaves)
    latent = load_file(records / name / "item_0" / f"{number}.latent")["latent_tensor"]
    assert torch.equal(latent, found.state.latents([leaves[number]]))
    assert Image.open(search_view.picture(records, name, 0, number)).size == (8, 8)
    file = search_view.take(records, tmp_path / "input", name, 0, number)
    assert torch.equal(load_file(tmp_path / "input" / file)["latent_tensor"], latent)


def test_only_the_best_are_kept(records, monkeypatch):
    monkeypatch.setattr(search_record, "KEPT", 3)
    with Record(records, "", "mine", 2) as record:
        found = searched(record, BestOfConfig(), calls=80, item=1)
    (folder,) = records.iterdir()
    view = search_view.record(records, folder.name, 0)["items"]
    assert view[0] is None and len(view[1]["kept"]) == 3
    assert view[1]["kept"][0][0] == found.best.number
    assert len(list((folder / "item_1").iterdir())) == 6


def test_a_record_that_a_crash_left_does_not_go_on(records):
    record = Record(records, "", "mine", 1)
    searched(record, BestOfConfig(), calls=8)
    (folder,) = records.iterdir()
    assert search_view.record(records, folder.name, os.getpid())["going"]
    assert not search_view.record(records, folder.name, os.getpid() + 1)["going"]


def test_a_record_of_another_shape_breaks_no_list(records, tmp_path):
    with Record(records, "a seven", "mine", 1) as record:
        searched(record, TreeConfig(leaves=4))
    (name,) = (entry.name for entry in records.iterdir())
    whole = json.loads((records / name / "view.json").read_text())
    tree = whole["items"][0]["tree"]
    item = whole["items"][0]
    wrong = [
        [], {}, None, 7, {**whole, "items": 5}, {**whole, "items": [7]}, {**whole, "pid": "x"},
        {k: v for k, v in whole.items() if k != "items"}, {**whole, "items": [{**item, "history": [1]}]},
        # A page would walk from a node to its parent for ever.
        {**whole, "items": [{**item, "tree": {**tree, "parent": [0] * len(tree["parent"])}}]},
        {**whole, "items": [{**item, "tree": {**tree, "value": []}}]}, {**whole, "items": [{**item, "tree": []}]},
        {**whole, "items": [{**item, "calls": "many"}]},
    ]  # fmt: skip
    texts = [json.dumps(one) for one in wrong] + ["[" * 100_000, "{", '{"pid": ' + "9" * 5000 + "}"]
    for number, text in enumerate(texts):
        folder = records / f"20200101-000000-{number:08x}"
        folder.mkdir()
        (folder / "view.json").write_text(text)
        with pytest.raises(ValueError, match="cannot be read"):
            search_view.record(records, folder.name, 0)
    assert [s["name"] for s in search_view.searches(records, tmp_path / "none", 0)["searches"]] == [name]


def test_a_large_record_is_cut(records):
    item = {
        "method": "dts", "calls": 1, "rewards": 1, "seconds": math.inf, "history": [[1, math.nan]] * 20_000, "best": [],
        "kept": [], "tree": {"size": 9, "stops": 2, "sigmas": [1.0], "parent": [-1, *[0] * 19_999],
        "place": [0] * 20_000, "value": [0.123456] * 20_000, "number": [123_456] * 20_000},
    }  # fmt: skip
    folder = records / "20200101-000000-00000000"
    folder.mkdir(parents=True)
    whole = {"pid": 0, "going": True, "prompt": "p" * 90_000, "reward": "r", "begun": 0, "items": [item] * 9}
    (folder / "view.json").write_text(json.dumps(whole))
    text = json.dumps(search_view.record(records, folder.name, 0), allow_nan=False)
    assert len(text) < 1_000_000
    listed = search_view.searches(records, records, 0)["searches"][0]["items"][0]
    assert len(json.dumps(listed)) < 500


def test_old_records_go(records):
    for i in range(20):
        (records / f"20200101-0000{i:02d}-00000000").mkdir(parents=True)
    with Record(records, "", "mine", 1):
        pass
    assert len(list(records.iterdir())) == search_record.RECORDS


def test_a_full_disk_ends_the_record_and_not_the_search(records, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    record = Record(records, "", "mine", 1)
    monkeypatch.setattr(search_record, "_small", full)
    with record:
        found = searched(record, BestOfConfig(), calls=16)
    assert found.best.reward > -10 and record.folder is None
    assert "the panel will not show this search" in caplog.text


def test_without_a_folder_nothing_is_kept():
    with Record(None, "", "mine", 1) as record:
        assert searched(record, BestOfConfig(), calls=8).best


def test_names_stay_in_their_folder(records, tmp_path):
    records.mkdir()
    for name in ("../x", "..", "20200101-000000-0000000g", "20200101-000000-00000000/..", ""):
        with pytest.raises(ValueError, match="no search's name"):
            search_view.record(records, name, 0)
    with pytest.raises(FileNotFoundError, match="has found nothing yet"):
        search_view.record(records, "20200101-000000-00000000", 0)
    with pytest.raises(FileNotFoundError, match="only the best are"):
        search_view.take(records, tmp_path, "20200101-000000-00000000", 0, 5)


def test_a_search_that_was_cancelled_is_told_by_what_was_asked(records, tmp_path):
    """So often as it was; what another was asked for, and what ended by itself, do not count."""
    for seed, ends in ((3, True), (3, False), (4, True)):
        with Record(records, "a seven", "mine", 1, search_record.asked(seed, 4, 60, None)) as record:
            searched(record, BestOfConfig())
            if ends:
                record.cancel()
    # Neither one that is damaged nor a number without an end hides the others.
    (records / "00000000-000000-00000000").mkdir()
    (records / "00000000-000000-00000000" / "view.json").write_text("{", encoding="utf-8")
    for folder in records.iterdir():
        view = folder / "view.json"
        view.write_text(view.read_text("utf-8").replace('"mine"', '"mine", "far": Infinity'), encoding="utf-8")
    assert search_record.cancelled(records, search_record.asked(3, 4, 60, 0.0)) == 1
    assert search_record.cancelled(records, search_record.asked(3, 4, 61, 0)) == 0
    assert search_record.cancelled(None, "") == search_record.cancelled(tmp_path / "none", "") == 0
    listed = search_view.searches(records, tmp_path / "none", os.getpid())["searches"]
    assert sorted(one["cancelled"] for one in listed) == [False, True, True]
