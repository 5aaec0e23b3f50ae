"""Preferences from and to plain files and parquet, Pick-a-Pic's columns, and what a hostile file may not do."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from retort.preferences import store as preferences
from retort.preferences.exchange import take_in, write_folder, write_parquet


@pytest.fixture
def given(tmp_path):
    """A set of three pairs, one of them a tie."""
    folder = tmp_path / "set"
    names = [preferences.keep_image(folder, torch.full((4, 6, 3), i / 4)) for i in range(4)]
    judged = [("a one", 0, 1, None), ("a two", 2, 1, 3.0), ("a two", 3, 0, 0)]
    preferences.append(
        folder, [{"prompt": p, "winner": names[w], "loser": names[x], "strength": s} for p, w, x, s in judged]
    )
    return preferences.read(folder)


def seen(found):
    """What does not depend on names and strengths."""
    return [
        (p.prompt, *(preferences.load_image(found.folder / n).mean().item() for n in (p.winner, p.loser)),
         p.certainty == 0) for p in found.pairs
    ]  # fmt: skip


def decided(pairs):
    """Ties with their pictures in order."""
    return [(p, *(sorted((a, b)) if tie else (a, b)), tie) for p, a, b, tie in pairs]


def test_a_folder_written_is_the_set_read_again(given, tmp_path):
    out = tmp_path / "out"
    assert write_folder(given, out) == 3
    rows = [json.loads(row) for row in (out / "train/metadata.jsonl").read_text().splitlines()]
    assert [(r["label_0"], r["label_1"]) for r in rows] == [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]
    assert all((out / "train" / r["jpg_1_file_name"]).is_file() for r in rows)
    assert take_in(out, tmp_path / "again", "import") == (3, [])
    again = preferences.read(tmp_path / "again")
    assert decided(seen(again)) == decided(seen(given)) and {p.by for p in again.pairs} == {"import"}
    # A second time it is the same set.
    take_in(out / "train", tmp_path / "again", "import")
    assert len(preferences.read(tmp_path / "again").pairs) == 3


def test_parquet_written_is_the_set_read_again(given, tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "out.parquet"
    assert write_parquet(given, path) == 3 and [p.name for p in tmp_path.glob("*out*")] == ["out.parquet"]
    assert take_in(path, tmp_path / "again", "import") == (3, [])
    assert decided(seen(preferences.read(tmp_path / "again"))) == decided(seen(given))


def test_parquet_of_others(given, tmp_path):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    one, two = ((given.folder / n).read_bytes() for n in (given.pairs[0].winner, given.pairs[0].loser))

    def written(rows):
        pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "data.parquet")
        return tmp_path / "data.parquet"

    row = {"caption": "a one", "jpg_0": {"bytes": one, "path": "/etc/passwd"}, "jpg_1": {"bytes": two, "path": ""}}
    rows = [{**row, "label_0": 1.0, "other": 3}, {**row, "label_0": 0.7}, {**row, "label_0": 0.0, "jpg_0": None}]
    taken, problems = take_in(written(rows), tmp_path / "again", "import")
    assert taken == 1 and [p[:6] for p in problems] == ["row 2:", "row 3:"]
    with pytest.raises(ValueError, match="no column label_0"):
        take_in(written([row]), tmp_path / "again", "import")
    (tmp_path / "data.parquet").write_bytes(b"PAR1 is no parquet")
    with pytest.raises(ValueError, match=r"data\.parquet cannot be read"):
        take_in(tmp_path / "data.parquet", tmp_path / "again", "import")


def test_parquet_without_pyarrow_names_the_extra(given, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    for act in (lambda: take_in(tmp_path / "data.parquet", tmp_path, ""), lambda: write_parquet(given, tmp_path / "x")):
        with pytest.raises(ImportError, match=r"install retort\[parquet\]"):
            act()


def test_bad_rows_are_named_and_the_good_ones_taken(given, tmp_path):
    out = tmp_path / "out"
    write_folder(given, out)
    path = out / "train/metadata.jsonl"
    good = json.loads(path.read_text().splitlines()[0])
    (tmp_path / "secret.png").write_bytes((given.folder / given.pairs[0].winner).read_bytes())
    (out / "train/fake.png").write_bytes(b"no picture")
    bad = [
        {**good, "jpg_0_file_name": "../../secret.png"}, {**good, "jpg_0_file_name": "fake.png"},
        {**good, "jpg_0_file_name": str(tmp_path / "secret.png")}, {**good, "jpg_0_file_name": 3},
        {**good, "jpg_0_file_name": good["jpg_1_file_name"]}, {**good, "label_0": 2}, {**good, "label_0": "1"},
        {**good, "caption": None}, {**good, "caption": "x" * 9000}, {"caption": "a"}, [1],
    ]  # fmt: skip
    rows = [good, *bad, {**good, "caption": "last"}]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"caption": "torn', encoding="utf-8")
    taken, problems = take_in(out, tmp_path / "again", "import")
    assert taken == 2 and [p.split(":")[0] for p in problems] == [f"row {i}" for i in (*range(2, 13), 14)]
    assert [p.prompt for p in preferences.read(tmp_path / "again").pairs] == ["a one", "last"]


def test_what_holds_no_pairs_is_refused(given, tmp_path):
    with pytest.raises(ValueError, match="neither a folder"):
        take_in(tmp_path / "none", tmp_path / "again", "")
    with pytest.raises(ValueError, match=r"there is no train/metadata\.jsonl"):
        take_in(given.folder, tmp_path / "again", "")


def test_latents_are_no_plain_files(tmp_path):
    names = [preferences.keep_latent(tmp_path, torch.full((4, 2, 2), float(i))) for i in range(2)]
    preferences.append(tmp_path, [{"prompt": "", "winner": names[0], "loser": names[1]}])
    with pytest.raises(ValueError, match="line 1: latents"):
        write_folder(preferences.read(tmp_path), tmp_path / "out")
