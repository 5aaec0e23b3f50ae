"""Folders of pictures with captions and the pairs of sets: what a page is told, and what it may change."""

from __future__ import annotations

import hashlib
import json
import re
import time

import pytest
import torch
from PIL import Image

from retort.hosts import data_view
from retort.preferences import store as preferences


def patiently(work):
    """What `work` gives in the end, however large what it reads is."""
    end = time.monotonic() + 60
    while True:
        try:
            return work()
        except BlockingIOError:
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.fixture
def inputs(tmp_path):
    """An input folder with 120 pictures in `cats`, of which two have captions."""
    folder = tmp_path / "input" / "cats"
    folder.mkdir(parents=True)
    for i in range(120):
        Image.new("RGB", (8, 8), (i, 2 * i, 0)).save(folder / f"{i:03}.png")
    (folder / "000.txt").write_text("a cat\n", encoding="utf-8")
    (folder / "001.txt").write_bytes("ein Kätzchen".encode("utf-16"))
    (folder / "notes.md").write_text("no picture")
    (tmp_path / "input" / "empty").mkdir()
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "a.png").write_bytes(b"")
    (tmp_path / "input" / "link").symlink_to(tmp_path / "secret")
    (folder / "out.png").symlink_to(tmp_path / "secret" / "a.png")
    return tmp_path / "input"


def test_pictures_come_page_by_page_with_their_captions(inputs):
    assert data_view.folders(inputs) == [{"name": "cats", "pictures": 120}, {"name": "link", "pictures": 1}]
    found = patiently(lambda: data_view.pictures(inputs, "cats", 0))
    assert (found["total"], found["of"], len(found["pictures"])) == (120, 120, data_view.PAGE)
    assert [one["caption"] for one in found["pictures"][:3]] == ["a cat", "ein Kätzchen", ""]
    last = patiently(lambda: data_view.pictures(inputs, "cats", 100))
    assert [one["name"] for one in last["pictures"]] == [f"{i:03}.png" for i in range(100, 120)]
    assert patiently(lambda: data_view.pictures(inputs, "cats", 0, "05"))["total"] == 12
    assert patiently(lambda: data_view.pictures(inputs, "cats", 5000))["pictures"] == []


def shown(inputs, name):
    """A picture of `cats` as a page is told of it."""
    return patiently(lambda: data_view.pictures(inputs, "cats", 0, name))["pictures"][0]


def test_a_caption_is_written_where_it_was_and_no_other_change_is_lost(inputs):
    first = shown(inputs, "000.png")["version"]
    written = data_view.write_caption(inputs, "cats", "000.png", "a black cat", first)
    data_view.write_caption(inputs, "cats", "007.png", "sieben", shown(inputs, "007.png")["version"])
    assert (inputs / "cats" / "000.txt").read_text("utf-8") == "a black cat"
    assert (inputs / "cats" / "007.txt").read_text("utf-8") == "sieben"
    assert written == shown(inputs, "000.png")["version"] != first
    with pytest.raises(data_view.ChangedError, match="000.png was changed meanwhile") as caught:
        data_view.write_caption(inputs, "cats", "000.png", "mine", first)
    assert (caught.value.now.caption, caught.value.now.version) == ("a black cat", written)
    assert (inputs / "cats" / "000.txt").read_text("utf-8") == "a black cat"
    data_view.write_caption(inputs, "cats", "000.png", "mine", written)
    assert (inputs / "cats" / "000.txt").read_text("utf-8") == "mine"


def test_a_caption_is_another_one_though_it_reads_the_same(inputs):
    """What is compared is the file's bytes, so an edit of what is not shown is not lost either."""
    before = shown(inputs, "000.png")["version"]
    (inputs / "cats" / "000.txt").write_bytes(b"\n\na cat\n\n")
    with pytest.raises(data_view.ChangedError):
        data_view.write_caption(inputs, "cats", "000.png", "mine", before)
    (inputs / "cats" / "002.txt").write_bytes(b"")
    with pytest.raises(data_view.ChangedError):
        data_view.write_caption(inputs, "cats", "002.png", "mine", "")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"a" * 9003, "003.txt holds 9003 characters, and 8192 can be shown"),
        (b"a" * (1 << 17), "003.txt has 131072 bytes, and 65536 can be shown"),
        ("ein Kätzchen".encode("latin-1"), r"003.txt cannot be read: it is no text in UTF-8 \(byte 5\)"),
    ],
)
def test_a_caption_that_cannot_be_shown_whole_stays_as_it_is(inputs, data, why):
    file = inputs / "cats" / "003.txt"
    file.write_bytes(data)
    one = shown(inputs, "003.png")
    assert (one["caption"], one["version"]) == ("", "") and re.match(why, one["note"])
    for before in (one["version"], hashlib.sha256(data).hexdigest()):
        with pytest.raises(ValueError, match="the caption of 003.png cannot be edited here: 003.txt"):
            data_view.write_caption(inputs, "cats", "003.png", "new", before)
    assert file.read_bytes() == data
    assert [shown(inputs, name)["note"] for name in ("000.png", "002.png")] == ["", ""]


def test_a_caption_that_is_a_link_or_a_folder_stays_as_it_is(inputs, tmp_path):
    (tmp_path / "secret" / "a.txt").write_text("secret")
    (inputs / "cats" / "003.txt").symlink_to(tmp_path / "secret" / "a.txt")
    (inputs / "cats" / "004.txt").mkdir()
    for name in ("003.png", "004.png"):
        assert shown(inputs, name)["caption"] == "" and shown(inputs, name)["note"]
        with pytest.raises(ValueError, match="cannot be edited here"):
            data_view.write_caption(inputs, "cats", name, "new", "")
    assert (tmp_path / "secret" / "a.txt").read_text() == "secret"


def test_a_folder_that_the_user_linked_is_one_of_theirs(inputs, tmp_path):
    """Links in the input folder are the user's own and are followed; those in a folder of pictures are not."""
    away = tmp_path / "away"
    away.mkdir()
    Image.new("RGB", (8, 8)).save(away / "dog.png")
    (away / "other.png").symlink_to(inputs / "cats" / "000.png")
    (away / "more").symlink_to(tmp_path / "secret")
    (inputs / "linked").symlink_to(away)
    (inputs / "lost").symlink_to(tmp_path / "nowhere")
    found = {one["name"]: one["pictures"] for one in data_view.folders(inputs)}
    assert found == {"cats": 120, "link": 1, "linked": 1}
    found = patiently(lambda: data_view.pictures(inputs, "linked", 0))
    assert [one["name"] for one in found["pictures"]] == ["dog.png"]
    data_view.write_caption(inputs, "linked", "dog.png", "a dog", "")
    assert (away / "dog.txt").read_text() == "a dog" and (inputs / "linked").is_symlink()
    for folder in ("lost", "linked/more"):
        with pytest.raises((ValueError, FileNotFoundError)):
            patiently(lambda folder=folder: data_view.pictures(inputs, folder, 0))


@pytest.mark.parametrize("folder", ["..", "empty/..", "nothing", "/etc"])
def test_folders_stay_in_the_input_folder(inputs, folder):
    with pytest.raises((ValueError, FileNotFoundError)):
        patiently(lambda: data_view.pictures(inputs, folder, 0))


@pytest.mark.parametrize("name", ["../cats/000.png", "000.txt", "out.png", "999.png", "..", "a\\b.png", "\0.png"])
def test_only_a_picture_of_the_folder_gets_a_caption(inputs, name):
    before = sorted(path.name for path in inputs.rglob("*"))
    with pytest.raises((ValueError, OSError)):
        data_view.write_caption(inputs, "cats", name, "x", "")
    assert sorted(path.name for path in inputs.rglob("*")) == before


def test_a_picture_is_taken_out_and_put_back_and_its_caption_stays(inputs):
    folder = inputs / "cats"
    bytes = (folder / "000.png").read_bytes()
    data_view.take_out_picture(inputs, "cats", "000.png")
    assert not (folder / "000.png").exists() and (folder / "000.txt").read_text("utf-8") == "a cat\n"
    assert patiently(lambda: data_view.pictures(inputs, "cats", 0))["total"] == 119
    out = patiently(lambda: data_view.pictures(inputs, "cats", 0, out=True))
    assert out["total"] == 1 and out["pictures"][0]["caption"] == "a cat"
    assert (out["pictures"][0]["name"], out["pictures"][0]["file"]) == ("000.png", "000.png.taken_out")
    data_view.write_caption(inputs, "cats", "000.png", "a dog", out["pictures"][0]["version"])
    with pytest.raises(FileNotFoundError, match=r"no picture called '000.png'$"):
        data_view.take_out_picture(inputs, "cats", "000.png")
    # A new picture of that name is not replaced, in neither direction.
    (folder / "000.png").write_bytes(b"another")
    with pytest.raises(ValueError, match="has a file called 000.png already"):
        data_view.put_back_picture(inputs, "cats", "000.png")
    with pytest.raises(ValueError, match="has a file called 000.png.taken_out already"):
        data_view.take_out_picture(inputs, "cats", "000.png")
    assert (folder / "000.png").read_bytes() == b"another"
    (folder / "000.png").unlink()
    data_view.put_back_picture(inputs, "cats", "000.png")
    assert (folder / "000.png").read_bytes() == bytes and (folder / "000.txt").read_text("utf-8") == "a dog"
    with pytest.raises(FileNotFoundError, match="'000.png' that was taken out"):
        data_view.put_back_picture(inputs, "cats", "000.png")


@pytest.mark.parametrize("name", ["../secret/a.png", "out.png", "notes.md", "000.txt", ""])
def test_only_a_picture_of_the_folder_is_taken_out(inputs, name):
    before = sorted(path.name for path in inputs.rglob("*"))
    for act in (data_view.take_out_picture, data_view.put_back_picture):
        with pytest.raises((ValueError, OSError)):
            act(inputs, "cats", name)
    assert sorted(path.name for path in inputs.rglob("*")) == before


def test_pictures_without_a_caption_are_marked_where_others_have_one(inputs):
    found = patiently(lambda: data_view.pictures(inputs, "cats", 0))["pictures"]
    assert [["bare", ""] in one["marks"] for one in found[:4]] == [False, False, True, True]
    marked = patiently(lambda: data_view.pictures(inputs, "cats", 0, marked=True))
    assert marked["total"] == 118 and marked["pictures"][0]["name"] == "002.png"
    for name in ("000.txt", "001.txt"):
        (inputs / "cats" / name).unlink()
    found = patiently(lambda: data_view.pictures(inputs, "cats", 0))["pictures"]
    assert not any(["bare", ""] in one["marks"] for one in found)


@pytest.mark.parametrize("caption", ["x" * 9000, "half \ud800"])
def test_a_caption_is_a_text(inputs, caption):
    with pytest.raises(ValueError, match="at most 8192 characters"):
        data_view.write_caption(inputs, "cats", "005.png", caption, "")
    assert not (inputs / "cats" / "005.txt").exists()


@pytest.fixture
def sets(tmp_path):
    """A set of 130 pairs of three pictures."""
    folder = tmp_path / "sets" / "taste"
    names = [preferences.keep_image(folder, torch.full((4, 6, 3), i / 3)) for i in range(3)]
    rows = [
        {"prompt": f"prompt {i}", "winner": names[i % 3], "loser": names[(i + 1) % 3], "strength": 0.5, "by": "me"}
        for i in range(130)
    ]
    preferences.append(folder, rows)
    return tmp_path / "sets"


def test_a_wrong_pair_is_taken_out_and_put_back(sets):
    first = patiently(lambda: data_view.pairs(sets, "taste", 0))
    assert first["total"] == 130 and [one["prompt"] for one in first["pairs"][:2]] == ["prompt 129", "prompt 128"]
    assert len(patiently(lambda: data_view.pairs(sets, "taste", 100))["pairs"]) == 30
    wrong = first["pairs"][1]
    for _ in range(2):
        data_view.take_out(sets, "taste", wrong["line"])
    left = patiently(lambda: data_view.pairs(sets, "taste", 0))
    assert left["total"] == 129 and "prompt 128" not in [one["prompt"] for one in left["pairs"]]
    for _ in range(2):
        data_view.put_back(sets, "taste", wrong["line"])
    assert len((sets / "taste" / preferences.PAIRS).read_text().splitlines()) == 132
    again = preferences.read(sets / "taste").pairs
    assert len(again) == 130 and again[-1].prompt == "prompt 128" and again[-1].strength == 0.5
    assert patiently(lambda: data_view.pairs(sets, "taste", 0, "PROMPT 12"))["total"] == 11


@pytest.mark.parametrize("line", [0, 131, 10**9])
def test_only_a_pair_of_the_set_is_taken_out_or_put_back(sets, line):
    size = (sets / "taste" / preferences.PAIRS).stat().st_size
    for act in (data_view.take_out, data_view.put_back):
        with pytest.raises(FileNotFoundError, match=f"line {line} of the set tells of no pair"):
            act(sets, "taste", line)
    assert (sets / "taste" / preferences.PAIRS).stat().st_size == size


def test_a_set_of_100000_pairs_answers_within_a_fifth_of_a_second(tmp_path, slowness):
    """Once it has been read; meanwhile the page is told to ask again, at once."""
    folder = tmp_path / "large"
    names = [preferences.keep_image(folder, torch.full((2, 2, 3), i / 3)) for i in range(3)]
    lines = (
        json.dumps({"prompt": f"prompt {i}", "winner": names[i % 3], "loser": names[(i + 1) % 3], "by": ""})
        for i in range(100_000)
    )
    (folder / preferences.PAIRS).write_text("\n".join(lines) + "\n")
    began = time.thread_time()  # of the thread that answers: another one reads
    with pytest.raises(BlockingIOError, match="ask again"):
        data_view.pairs(tmp_path, "large", 0)
    assert time.thread_time() - began < 0.2 * slowness
    patiently(lambda: data_view.pairs(tmp_path, "large", 0))
    for offset, find in ((0, ""), (99_950, ""), (0, "77")):
        took = []
        for _ in range(3):
            began = time.process_time()
            found = patiently(lambda offset=offset, find=find: data_view.pairs(tmp_path, "large", offset, find))
            took.append(time.process_time() - began)
            assert len(json.dumps(found)) < 1_000_000
        assert min(took) < 0.2 * slowness, took
