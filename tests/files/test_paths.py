"""Names below a folder, what a folder of the user's own holds behind links, and names that another system spelt."""

from __future__ import annotations

import os

import pytest

from retort.files.paths import FileNames, PathError, below, dead_link, files_below, inside, walked

ENDINGS = (".safetensors",)


def file(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


@pytest.fixture
def roots(tmp_path):
    """(a folder of models, a disk elsewhere)."""
    (tmp_path / "models").mkdir()
    (tmp_path / "disk").mkdir()
    return tmp_path / "models", tmp_path / "disk"


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "..\\x", "a\\..\\x", "/x", "\\x", "C:\\x", "c:x", "\\\\host\\share\\x", "//host/share/x",
     "a\0b", "a\nb", "", "  ", "x" * 300, "é" * 200, "a/" * 2000 + "x", "\ud800"],
)  # fmt: skip
@pytest.mark.parametrize("way", [below, inside])
def test_no_name_leaves_its_folder(roots, name, way):
    with pytest.raises(PathError):
        way(roots[0], name)


@pytest.mark.parametrize("name", ["a/b.x", "a\\b.x", "a/./b.x", ".\\a\\b.x"])
def test_both_separators_lead_to_the_same_file_in_its_own_case(roots, name):
    assert below(roots[0], name) == inside(roots[0], name) == roots[0] / "a" / "b.x"
    assert below(roots[0], name.replace("b", "B")).name == "B.x"


def test_links_are_followed_below_and_refused_inside(roots):
    models, disk = roots
    file(disk / "x.safetensors")
    (models / "far").symlink_to(disk)
    (models / "one.safetensors").symlink_to(disk / "x.safetensors")
    for name in ("far/x.safetensors", "one.safetensors"):
        assert below(models, name).is_file()
        with pytest.raises(PathError, match="is a link to .*put the file itself there"):
            inside(models, name)
    # A folder that is itself a link, and a link that stays within it, are nobody's way out.
    whole = models.with_name("linked")
    whole.symlink_to(models)
    file(models / "a" / "y.safetensors")
    (models / "b").symlink_to(models / "a")
    assert inside(whole, "b/y.safetensors").is_file()


def test_what_lies_behind_links_is_listed(roots):
    models, disk = roots
    file(disk / "far" / "deep" / "x.safetensors")
    file(disk / "far" / "Y.SAFETENSORS")
    file(disk / "far" / "notes.txt")
    file(models / "sub" / "z.safetensors")
    (models / "far").symlink_to(disk / "far")
    (models / "one.safetensors").symlink_to(disk / "far" / "deep" / "x.safetensors")
    (models / "dead.safetensors").symlink_to(disk / "nothing.safetensors")
    (models / "folder.safetensors").mkdir()
    found = ["far/Y.SAFETENSORS", "far/deep/x.safetensors", "one.safetensors", "sub/z.safetensors"]
    assert files_below([models], ENDINGS) == found
    assert files_below([models, disk / "far", disk / "none"], ENDINGS) == [
        *found,
        "Y.SAFETENSORS",
        "deep/x.safetensors",
    ]
    assert files_below([models], ENDINGS, deep=False) == ["one.safetensors"]


def test_a_folder_that_is_linked_to_twice_is_listed_twice(roots):
    models, disk = roots
    file(models / "style" / "x.safetensors")
    (models / "liked").symlink_to(models / "style")
    assert files_below([models], ENDINGS) == ["liked/x.safetensors", "style/x.safetensors"]


def test_circles_of_links_do_no_harm(roots):
    models, disk = roots
    file(models / "a" / "x.safetensors")
    (models / "a" / "up").symlink_to(models)
    (models / "a" / "self").symlink_to(models / "a")
    (models / "there").symlink_to(disk)
    (disk / "back").symlink_to(models)
    os.symlink(models / "loop", models / "loop")
    os.symlink(models / "two", models / "one")
    os.symlink(models / "one", models / "two")
    assert files_below([models], ENDINGS) == ["a/x.safetensors"]


def test_many_links_to_one_another_end_soon(roots):
    models, _ = roots
    for i in range(20):
        file(models / f"m{i:02}" / "x.safetensors")
    for i in range(20):
        for j in range(20):
            (models / f"m{i:02}" / f"to{j:02}").symlink_to(models / f"m{j:02}")
    seen = list(walked(models))
    assert len(seen) < 21 * 8
    assert {f"m{i:02}/x.safetensors" for i in range(20)} <= set(files_below([models], ENDINGS))


def test_very_deep_folders_end(roots):
    path = roots[0]
    for _ in range(60):
        path = path / "d"
    file(path / "x.safetensors")
    assert files_below([roots[0]], ENDINGS) == []


def test_a_dead_link_is_named(roots):
    models, disk = roots
    (models / "far").symlink_to(disk / "away")
    os.symlink(models / "loop", models / "loop")
    for name, part in (("far/a/x.safetensors", "far"), ("loop", "loop")):
        assert dead_link([disk, models], name).startswith(f"{models / part} is a link to ")
    assert dead_link([models], "absent/x") == ""


def test_a_name_is_known_by_either_separator():
    names = FileNames(["none", "style/Bold.safetensors", "win\\a.safetensors", "both\\x", "both/x"])
    assert "style\\Bold.safetensors" in names and "win/a.safetensors" in names
    assert names.spelt("style\\Bold.safetensors") == "style/Bold.safetensors"
    assert names.spelt("win/a.safetensors") == "win\\a.safetensors"
    assert names.spelt("both/x") == "both/x" and names.spelt("both\\x") == "both\\x"
    for other in ("style\\bold.safetensors", "Bold.safetensors", "style\\", "..\\style\\Bold.safetensors", 3, None, []):
        assert other not in names and names.spelt(other) is None


def test_accents_of_either_system_lead_to_the_file(roots):
    whole, parts = "caf\u00e9/\u00e5.safetensors", "cafe\u0301/a\u030a.safetensors"
    for there, asked in ((whole, parts), (parts, whole)):
        folder = roots[0] / str(len(there))
        made = file(folder / there)
        for way in (below, inside):
            assert way(folder, asked) == way(folder, there) == made
        assert FileNames([there]).spelt(asked) == there and asked in FileNames([there])
        assert files_below([folder], ENDINGS) == [there]
    # Where both are there, each is itself; what is nowhere keeps its spelling.
    file(roots[0] / str(len(whole)) / parts)
    assert below(roots[0] / str(len(whole)), parts).read_bytes() == b""
    assert below(roots[0], parts) == roots[0] / parts
    assert FileNames([whole, parts]).spelt(parts) == parts


def test_what_systems_write_beside_files_is_not_listed(roots):
    for name in ("a", "._a", "s/._b", ".git/x", "s/.git/y/z"):
        file(roots[0] / f"{name}.safetensors")
    assert files_below([roots[0]], ENDINGS) == ["a.safetensors"]
