"""The one place that touches a stranger's folder: no link in it is followed, at any depth, whatever is done."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from retort.files import atomic as files
from retort.files import entries
from retort.files.entries import LinkError
from retort.files.folder import Inside, alone, inside, part_name

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="making links needs a right there")


@pytest.fixture(params=[True, False], ids=["by handle", "looked at first"])
def way(request, monkeypatch):
    """Both ways to the files: relative to folders that are held open, and, as on Windows, by paths."""
    if request.param and not entries.BY_HANDLE:
        pytest.skip("folders cannot be held open here")
    monkeypatch.setattr(entries, "BY_HANDLE", request.param)


def lock(place: Inside) -> None:
    with place.locked():
        pass


def fresh(place: Inside) -> None:
    with place.fresh() as handle:
        handle.write(b"theirs")


DEEDS = {
    "read": lambda place: place.read(),
    "look": lambda place: place.is_file(),
    "name": lambda place: place.checked(),
    "append": lambda place: place.append([b"theirs\n"]),
    "overwrite": lambda place: place.write(b"theirs"),
    "fresh": fresh,
    "rename": lambda place: place.rename("b.jsonl"),
    "delete": lambda place: place.remove(),
    "lock": lock,
    "held": lambda place: place.held(),
    "clear": lambda place: place.remove_tree(),
}


def marks(outside):
    return {str(p.relative_to(outside)): p.read_bytes() if p.is_file() else None for p in sorted(outside.rglob("*"))}


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("kind", ["file", "folder above", "new file", "circle"])
@pytest.mark.parametrize("deed", DEEDS)
def test_no_link_is_followed(tmp_path, way, deed, kind, depth):
    outside, run = tmp_path / "outside", tmp_path / "run"
    outside.mkdir()
    (outside / "a.jsonl").write_bytes(b"mine\n")
    parts = ["one", "two", "three"][: depth - 1]
    above = run.joinpath(*parts)
    above.mkdir(parents=True)
    if kind == "folder above":
        (above / "linked").symlink_to(outside)
        place, link = inside(run).__truediv__("/".join([*parts, "linked", "a.jsonl"])), above / "linked"
    else:
        link = above / "a.jsonl"
        link.symlink_to({"file": outside / "a.jsonl", "new file": outside / "b.jsonl", "circle": link}[kind])
        place = inside(run).__truediv__("/".join([*parts, "a.jsonl"]))
    before = marks(outside)
    if deed == "clear":
        place = inside(run) / parts[0] if parts else place
        place = place.parent if kind == "folder above" and not parts else place
    with pytest.raises(LinkError, match=f"{link.name} is a link to "):
        DEEDS[deed](place)
    assert marks(outside) == before and link.is_symlink()
    with pytest.raises(LinkError, match=f"{link.name} is a link to "):
        inside(run).refuse_links()


def test_the_chosen_folder_may_itself_be_a_link(tmp_path, way):
    (tmp_path / "disk" / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "runs")
    (tmp_path / "shown").symlink_to(tmp_path / "disk" / "runs" / "mine")
    for chosen in (tmp_path / "runs" / "mine", tmp_path / "shown"):
        inside(chosen).refuse_links()
        (inside(chosen) / "previews/a.png").write(b"a")
        assert (inside(chosen) / "previews/a.png").read() == b"a"
    alone(tmp_path / "runs" / "b.json").write(b"b")
    assert (tmp_path / "disk" / "runs" / "b.json").read_bytes() == b"b"


def test_what_it_writes_appends_lists_and_deletes(tmp_path, way):
    place = inside(tmp_path / "new") / "inner/a.jsonl"
    assert place.stat() is None and not place.is_file() and not place.remove() and not place.held()
    assert place.parent.files() == [] and not (tmp_path / "new").exists()  # looking makes nothing
    place.append([b"one\n"])
    with open(place.path, "ab") as handle:
        handle.write(b"torn")
    place.append([b"two\n", b"three\n"])
    assert place.read() == b"one\ntorn\ntwo\nthree\n" and place.changed() == os.stat(place.path).st_mtime_ns
    place.write(b"whole")
    assert place.read(5) == b"whole" and place.checked() == place.path
    with pytest.raises(ValueError, match=r"a\.jsonl is larger than 4 bytes"):
        place.read(4)
    (place.parent / "deeper").make()
    assert place.parent.files() == ["a.jsonl"] and place.parent.folders() == ["deeper"]
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        (place.parent / "none.json").read()
    with pytest.raises(OSError, match="cannot write .*deeper"):
        (place.parent / "deeper").write(b"x")
    for name in (".a.jsonl.7.part", ".b.7.part", ".a.jsonl", "a.part"):
        (place.parent / name).write(b"")
    place.parent.forget_parts("a.jsonl")
    assert place.parent.files() == [".a.jsonl", ".b.7.part", "a.jsonl", "a.part"]
    place.parent.forget_parts()
    assert place.parent.files() == [".a.jsonl", "a.jsonl", "a.part"]
    assert place.rename("b") and not place.path.exists() and (place.parent / "b").read() == b"whole"
    assert not (place.parent / "b").rename("a.part") and (place.parent / "a.part").read() == b""
    assert (place.parent / "b").rename("a.jsonl") and place.read() == b"whole"
    with pytest.raises(FileNotFoundError, match="no such file"):
        (place.parent / "b").rename("c")
    with pytest.raises(ValueError, match="no name of a file"):
        place.rename("../c")
    assert place.remove() and not place.path.exists()
    (inside(tmp_path) / "new").remove_tree()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_not_finished_is_not_there(tmp_path, way):
    place = inside(tmp_path) / "a.json"
    place.write(b"before")
    with pytest.raises(KeyError), place.fresh() as handle:
        handle.write(b"half")
        raise KeyError
    assert place.read() == b"before" and os.listdir(tmp_path) == ["a.json"]


def test_a_lock_has_one_holder_and_asking_makes_none(tmp_path, way):
    place = inside(tmp_path) / "lock"
    assert not place.held() and not place.path.exists()
    with place.locked():
        assert place.held()
        with pytest.raises(BlockingIOError, match="belongs to a run"), place.locked():
            pass
    assert not place.held()


@pytest.mark.parametrize("way_in", ["read", "append", "lock"])
def test_a_pipe_is_not_waited_for(tmp_path, way, way_in):
    os.mkfifo(tmp_path / "pipe")
    failed = []

    def act():
        try:
            DEEDS[way_in](inside(tmp_path) / "pipe")
        except OSError as error:
            failed.append(str(error))

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(5)
    assert failed and "pipe" in failed[0]


@pytest.mark.parametrize("name", ["..", ".", "", "a/../b", "/etc/passwd", "a\\b", "a\0b"])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="is no name of a file or folder"):
        inside(tmp_path) / name


def test_temporary_names_cannot_be_foreseen_and_fit(tmp_path, way):
    assert part_name("a") != part_name("a") and len(part_name("x" * 255)) < 100
    (inside(tmp_path) / ("x" * 250)).write(b"")
    # A thousand links at the names that a process number would give.
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    run = tmp_path / "run"
    run.mkdir()
    for number in range(1000):
        (run / f".origin.json.{number}.part").symlink_to(victim)
    files.write_json(run / "origin.json", {"a": 1})
    files.check_writable(run)
    assert victim.read_bytes() == b"mine" and (run / "origin.json").read_text() == '{\n "a": 1\n}\n'


def test_new_files_take_free_names_also_behind_links(tmp_path, way):
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "none")
    assert files.write_new(tmp_path, "a", b"x") == tmp_path / "a_2.safetensors"
    assert files.write_new(tmp_path, "a.safetensors", b"y") == tmp_path / "a_3.safetensors"
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "a_2.safetensors", "a_3.safetensors"]
    assert not (tmp_path / "none").exists()


def test_folders_without_end_are_refused(tmp_path, way):
    deep = tmp_path
    for _ in range(40):
        deep = deep / "a"
    deep.mkdir(parents=True)
    with pytest.raises(ValueError, match="32 deep"):
        inside(tmp_path).refuse_links()
