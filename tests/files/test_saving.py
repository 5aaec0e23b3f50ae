"""Pictures and other results that are numbered: two processes never take one number, and nothing is written over."""

from __future__ import annotations

import errno
import multiprocessing
import os

import pytest
import torch

from retort.files import entries
from retort.files.atomic import write_new
from retort.files.folder import Inside
from retort.files.pictures import load_image, save_images

COUNT, AT_ONCE = 12, 4


def _save(what, folder, start, links, mark):
    if not links:
        _without_links()
    start.wait()
    for _ in range(COUNT // 2):
        if what == "pictures":
            save_images(torch.full((2, 4, 4, 3), mark / 10), "sub/a", folder)
        else:
            for _ in range(2):
                write_new(folder / "sub", "a", bytes([mark]))


def _without_links():
    """As on file systems that have no hard links."""

    def link(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    entries.os.link = link


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("what", ["pictures", "files"])
def test_processes_that_save_at_once_take_different_numbers(tmp_path, what, links):
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(AT_ONCE)
    runs = [fork.Process(target=_save, args=(what, tmp_path, start, links, i)) for i in range(AT_ONCE)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
    assert [run.exitcode for run in runs] == [0] * AT_ONCE
    saved = sorted((tmp_path / "sub").iterdir())
    assert len(saved) == COUNT * AT_ONCE, saved
    marks = [round(float(load_image(p)[0].mean()) * 10) if what == "pictures" else p.read_bytes()[0] for p in saved]
    assert sorted(marks) == sorted(list(range(AT_ONCE)) * COUNT)
    if what == "pictures":
        assert [path.name for path in saved] == [f"a_{i + 1:05}_.png" for i in range(len(saved))]


@pytest.mark.parametrize("prefix", ["a", "a_%batch_num%", "sub/%width%x%height%_%batch_num%"])
def test_what_is_there_stays(tmp_path, prefix):
    """Also under numbers of the batch, under which ComfyUI counts no file and begins at 1 again."""
    first = save_images(torch.zeros(3, 4, 8, 3), prefix, tmp_path)
    second = save_images(torch.ones(3, 4, 8, 3), prefix, tmp_path)
    assert len({*first, *second}) == 6
    assert all(float(load_image(path)[0].mean()) == 0 for path in first)
    assert [path.name[:-11] for path in first] == [path.name[:-11] for path in second]


def test_numbers_go_on_after_the_highest_and_leave_nothing_else(tmp_path):
    for name in ("a_00007_.webp", "a_00011_extra.png", "b_00020_.png", "a_x.png"):
        (tmp_path / name).write_bytes(b"")
    made = save_images(torch.rand(2, 4, 4, 3), "a", tmp_path)
    assert [path.name for path in made] == ["a_00012_.png", "a_00013_.png"]
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_a_link_at_a_number_is_passed_over(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").symlink_to(victim)
    for links in (True, False):
        if not links:
            monkeypatch.setattr(os, "link", os.link)
            _without_links()
        made = Inside(tmp_path / "out").write_first(["x", "y"], b"new")
        assert made is not None and made.name == "y" and not victim.exists()
        made.path.unlink()


def test_a_name_that_could_not_be_filled_is_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", os.link)
    _without_links()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(entries, "replace", full)
    (tmp_path / ".part").write_bytes(b"new")
    new = entries.Entry(tmp_path / "x", None)
    with pytest.raises(OSError, match="No space"):
        entries.take(new.beside(".part"), new)
    assert [path.name for path in tmp_path.iterdir()] == [".part"]


def test_what_a_killed_writer_left_goes_after_a_day(tmp_path):
    old, young = tmp_path / "..new.7.part.8.part", tmp_path / ".new.9.part"
    for left in (old, young):
        left.write_bytes(b"half")
    os.utime(old, (1, 1))
    write_new(tmp_path, "a", b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, "a.safetensors"]
