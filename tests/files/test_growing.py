"""Files that grow while they are read: only what is new is read, and what was replaced is read anew."""

from __future__ import annotations

import contextlib
import os
import random
import threading

import pytest
import torch

from retort.files import growing
from retort.files.folder import Inside
from retort.files.growing import Folders, Growing, Shelf
from retort.hosts import patience
from retort.preferences import store as preferences
from retort.preferences import tickets

BY = "pick"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lines"


def told(lines):
    return [line for _, line in lines.lines()]


def test_each_line_is_told_once(path):
    lines = Growing(Inside(path.parent, path.name), 100, 1000)
    assert told(lines) == [] and not lines.moved()
    path.write_bytes(b"a\n\n  \nb\nc")
    assert list(lines.lines()) == [(1, b"a"), (4, b"b")] and lines.unfinished == 5
    assert told(lines) == []
    with open(path, "ab") as handle:
        handle.write(b"d\n" + b"x" * 101 + b"\ne\n")
    assert not lines.moved() and list(lines.lines()) == [(5, b"cd"), (6, None), (7, b"e")] and lines.unfinished is None


@pytest.mark.parametrize(
    "after", [b"", b"a\n", b"x\nbb\n", b"a\nbb\nc", b"A\nbb\nccc\nd\n", b"a\nbB\nccc\nd\n"], ids=range(6)
)
def test_what_was_replaced_is_noticed(path, after):
    path.write_bytes(b"a\nbb\nccc\n")
    lines = Growing(Inside(path.parent, path.name), 100, 1000)
    assert len(told(lines)) == 3
    stamp = path.stat().st_mtime_ns + 1_000_000
    path.write_bytes(after)
    os.utime(path, ns=(stamp, stamp))
    assert lines.moved()
    lines.forget()
    assert told(lines) == after.splitlines()[: after.count(b"\n")]
    path.unlink()
    assert lines.moved() is (after != b"")


def test_blocks_of_any_size_give_the_same_lines(path, monkeypatch):
    draw = random.Random(5)
    parts = [bytes(draw.choices(b"ab \n", k=draw.randrange(1, 40))) for _ in range(60)]
    whole = Growing(Inside(path.parent, path.name), 25, 10_000)
    path.write_bytes(b"".join(parts))
    wanted = list(whole.lines())
    path.write_bytes(b"")
    for size in (1, 7, 64):
        monkeypatch.setattr(growing, "READ", size)
        path.write_bytes(b"")
        lines, found = Growing(Inside(path.parent, path.name), 25, 10_000), []
        for part in parts:
            with open(path, "ab") as handle:
                handle.write(part)
            found += lines.lines()
        assert found == wanted and lines.unfinished == whole.unfinished


def test_a_room_is_looked_at_again_when_it_has_changed(tmp_path):
    folders = Folders(Inside(tmp_path), "images")
    assert folders.look() and not folders.there
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"a")
    assert folders.look() and folders.there == {"images/a.png"}
    # A further change within a tick of the clock is seen too.
    (tmp_path / "images" / "b.png").write_bytes(b"b")
    assert folders.look() and len(folders.there) == 2
    os.utime(tmp_path / "images", ns=(1, 1))
    assert folders.look() and not folders.look()


def test_a_shelf_makes_anew_what_failed_and_keeps_a_few():
    made = []

    class Thing:
        def __init__(self, key):
            made.append(key)

        def refresh(self):
            raise ValueError("broken")

    shelf = Shelf(Thing, 2)
    with shelf.take("a"):
        pass
    with pytest.raises(ValueError, match="broken"), shelf.take("a"):
        pass
    for key in ("a", "b", "c", "a"):
        with shelf.take(key):
            pass
    assert made == ["a", "a", "b", "c", "a"]


def filled(folder, count):
    """A set with as many tickets, answered but for ten."""
    names = [preferences.keep_image(folder, torch.full((4, 4, 3), i / 40)) for i in range(40)]
    asked = [tickets.Ticket(f"p{i}", (names[i % 39], names[39]), by=BY) for i in range(count)]
    ids = tickets.ask(folder, asked)
    rows = [
        {"prompt": t.prompt, "winner": t.candidates[0], "loser": t.candidates[1], "strength": None, "by": BY,
         "ticket": id, "turn": i + 1}
        for i, (id, t) in enumerate(zip(ids[:-10], asked, strict=False))
    ]  # fmt: skip
    preferences.append(folder, rows)
    return ids


def test_an_answer_reads_its_own_lines_and_no_others(tmp_path, monkeypatch):
    """A bound on the work, whatever the set's size: lines that are taken apart."""
    ids = filled(tmp_path, 400)
    os.utime(tmp_path / "images", ns=(1, 1))  # a folder that has just changed is looked at again each time
    with tickets.at(tmp_path, BY) as state:
        assert (len(state.waiting), state.count(skipped=False)) == (10, 390)
    preferences.read(tmp_path)
    read = []
    plain, judged = tickets._object, preferences._judgement
    monkeypatch.setattr(tickets, "_object", lambda line: read.append(line) or plain(line))
    for number, id in enumerate(ids[-10:-5]):
        tickets.answer(tmp_path, id, 0, BY)
        with tickets.at(tmp_path, BY) as state:
            assert state.last == id and len(state.waiting) == 9 - number
    tickets.take_back(tmp_path, ids[-6], BY)
    with tickets.at(tmp_path, BY) as state:
        assert state.last == ids[-7] and len(state.waiting) == 6 and state.waiting[0].id == ids[-6]
    assert len(read) == 6
    monkeypatch.setattr(preferences, "_judgement", lambda number, line: read.append(line) or judged(number, line))
    read.clear()
    found = preferences.read(tmp_path)
    # Those of the five answers and the one that was taken back.
    assert len(read) == 6 and len(found.pairs) == 394
    assert preferences.read(tmp_path) is found
    fresh = tickets.TicketState(tmp_path, BY)
    with tickets.at(tmp_path, BY) as state:
        same = ("answers", "waiting", "problems", "turn", "tickets", "last")
        assert all(getattr(state, name) == getattr(fresh, name) for name in same)


def test_what_is_kept_equals_what_is_read_anew(tmp_path):
    """Whatever happens to the files between two looks."""
    filled(tmp_path, 30)
    draw = random.Random(3)
    pairs, asked = tmp_path / preferences.PAIRS, tmp_path / tickets.TICKETS
    images = sorted((tmp_path / "images").iterdir())
    for turn in range(60):
        with tickets.at(tmp_path, BY) as state:
            ids = list(state.tickets)
        what = draw.randrange(8)
        if what < 3 and ids:
            id = draw.choice(ids)
            with contextlib.suppress(ValueError):
                if what:
                    tickets.answer(tmp_path, id, draw.choice((0, "tie", "skip")), BY)
                else:
                    tickets.take_back(tmp_path, id, BY)
        elif what == 3:
            lines = pairs.read_bytes().splitlines(keepends=True)
            draw.shuffle(lines)
            pairs.write_bytes(b"".join(lines))
        elif what == 4:
            with open(draw.choice((pairs, asked)), "ab") as handle:
                handle.write(draw.choice((b"{", b"[1]\n", b'{"ticket": "x"}\n')))
        elif what == 5:
            lines = asked.read_bytes().splitlines(keepends=True)
            (tmp_path / "new").write_bytes(b"".join(lines[1:] + lines[:1]))
            os.replace(tmp_path / "new", asked)
        elif what == 6:
            images[turn % len(images)].unlink(missing_ok=True)
        else:
            preferences.keep_image(tmp_path, torch.full((4, 4, 3), turn / 60))
        fresh = tickets.TicketState(tmp_path, BY)
        with tickets.at(tmp_path, BY) as state:
            for name in ("answers", "waiting", "problems", "turn", "tickets"):
                assert getattr(state, name) == getattr(fresh, name), (turn, what, name)
        assert preferences.read(tmp_path) == preferences.Book(Inside(tmp_path)).preferences(), (turn, what)


def test_a_request_waits_a_moment_and_the_next_finds_it_done(monkeypatch):
    go_on, begun = threading.Event(), []

    def work():
        begun.append(1)
        return go_on.wait(30)

    monkeypatch.setattr(patience, "PATIENCE", 0.01)
    for _ in range(3):
        with pytest.raises(BlockingIOError, match="the set is large and is being read"):
            patience.soon("key", "the set", work)
    assert len(begun) == 1
    go_on.set()
    monkeypatch.setattr(patience, "PATIENCE", 30)
    assert patience.soon("key", "the set", work) is True
    assert patience.soon("key", "the set", lambda: "anew") in (True, "anew")
