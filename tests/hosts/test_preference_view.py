"""What a page is told of preference sets."""

from __future__ import annotations

import pytest
import torch

from retort.hosts import preference_view
from retort.preferences import store as preferences


def test_sets_and_their_latest_judgements(tmp_path):
    assert preference_view.every(tmp_path / "none") == []
    folder = tmp_path / "taste"
    names = [preferences.keep_image(folder, torch.full((4, 6, 3), i / 4)) for i in range(3)]
    rows = [
        {"prompt": "<b>", "winner": names[0], "loser": names[1], "by": "me"},
        {"prompt": "a", "winner": names[2], "loser": names[1], "strength": 0, "by": ""},
    ]
    preferences.append(folder, rows)
    (folder / preferences.PAIRS).open("a").write("rubbish\n")
    (tmp_path / "link").symlink_to(folder)
    (entry,) = preference_view.every(tmp_path)
    assert (entry["name"], entry["judged"], entry["blind"]) == ("taste", 2, False)
    found = preference_view.one(tmp_path, "taste")
    assert found["problems"] == 1 and "2 pairs" in found["statistics"] and "1 ties" in found["statistics"]
    tie, plain = found["latest"]
    assert tie["tie"] and not plain["tie"] and plain["prompt"] == "<b>" and plain["by"] == "me"
    assert f"images/{plain['winner']}.png" == names[0]


def test_names_stay_in_their_folder(tmp_path):
    for name in ("..", "a/../b", "/etc"):
        with pytest.raises(ValueError, match="cannot be a file's name"):
            preference_view.one(tmp_path, name)
    with pytest.raises(FileNotFoundError, match="no set called 'x'"):
        preference_view.one(tmp_path, "x")


def test_the_list_counts_pairs_again_when_a_set_has_grown(tmp_path, monkeypatch):
    folder = tmp_path / "test"
    names = [preferences.keep_image(folder, torch.full((4, 6, 3), i / 4)) for i in range(2)]
    row = {"prompt": "a", "winner": names[0], "loser": names[1], "by": "blind 1234"}
    preferences.append(folder, [row])
    assert [(one["judged"], one["blind"]) for one in preference_view.every(tmp_path)] == [(1, True)]
    preferences.append(folder, [{**row, "prompt": "b"}])
    # Without time to read, what was known before is said.
    with monkeypatch.context() as patch:
        patch.setattr(preference_view, "COUNTING", -1)
        assert [one["judged"] for one in preference_view.every(tmp_path)] == [1]
    assert [one["judged"] for one in preference_view.every(tmp_path)] == [2]
