"""Tickets: asked once, answered once, taken back; what is left of torn files, forged lines and writers at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch

from retort.files.atomic import locked
from retort.preferences import store as preferences
from retort.preferences import tickets
from retort.preferences.tickets import AnsweredError, Ticket, TicketState, answer, ask, take_back

BY = "pick"


@pytest.fixture
def names(tmp_path):
    """Eight pictures of the set in tmp_path, by name."""
    return [preferences.keep_image(tmp_path, torch.full((4, 6, 3), i / 8)) for i in range(8)]


@pytest.fixture
def two(tmp_path, names):
    """Two tickets of two, by id."""
    return ask(tmp_path, [Ticket("a seven", tuple(names[:2]), by=BY), Ticket("a two", tuple(names[2:4]), by=BY)])


def rows(folder):
    return [json.loads(line) for line in (folder / preferences.PAIRS).read_text().splitlines()]


def state(folder):
    found = TicketState(folder, BY)
    return len(found.waiting), found.count(skipped=False), found.count(skipped=True), found.last


def pairs(folder):
    return [(p.winner, p.loser, p.strength, p.by) for p in preferences.read(folder).pairs]


def test_a_question_is_asked_once(tmp_path, names, two):
    a, b, *_ = names
    assert state(tmp_path) == (2, 0, 0, None)
    swapped, others = Ticket("a seven", (b, a), by=BY), Ticket("a seven", (b, a), by="you")
    assert swapped.id == two[0] != others.id
    assert ask(tmp_path, [swapped, swapped]) == [] and ask(tmp_path, [others]) == [others.id]
    answer(tmp_path, two[0], 0, BY)
    assert ask(tmp_path, [swapped]) == [] and state(tmp_path) == (1, 1, 0, two[0])
    assert [t.id for t in TicketState(tmp_path, "you").waiting] == [others.id]
    assert not TicketState(tmp_path, BY).problems


def test_what_is_answered_is_a_pair(tmp_path, names, two):
    a, b, c, d, *_ = names
    answer(tmp_path, two[0], 1, BY)
    answer(tmp_path, two[1], "tie", BY)
    assert pairs(tmp_path) == [(b, a, None, BY), (c, d, 0.0, BY)]
    assert state(tmp_path) == (0, 2, 0, two[1])
    assert preferences.read(tmp_path).problems == ()


@pytest.mark.parametrize(("choice", "count"), [(2, 3), ("tie", 6), ("skip", 0)])
def test_four_are_answered_and_taken_back_as_one(tmp_path, names, choice, count):
    (id,) = ask(tmp_path, [Ticket("a", tuple(names[:4]), by=BY)])
    answer(tmp_path, id, choice, BY)
    found = pairs(tmp_path) if count else []
    assert len(found) == count and all(choice != 2 or winner == names[2] for winner, *_ in found)
    assert TicketState(tmp_path, BY).answers[id][0] == choice
    take_back(tmp_path, id, BY)
    assert state(tmp_path) == (1, 0, 0, None) and (not count or not pairs(tmp_path))
    answer(tmp_path, id, 0, BY)
    assert {winner for winner, *_ in pairs(tmp_path)} == {names[0]} and len(pairs(tmp_path)) == 3


def test_latents_are_what_pairs_name(tmp_path, names):
    latents = tuple(preferences.keep_latent(tmp_path, torch.full((4, 2, 2), float(i))) for i in range(2))
    (id,) = ask(tmp_path, [Ticket("a", tuple(names[:2]), latents, BY)])
    answer(tmp_path, id, 1, BY)
    assert pairs(tmp_path) == [(latents[1], latents[0], None, BY)]


def test_the_last_answer_is_taken_back_first_whatever_it_was(tmp_path, names):
    ids = ask(tmp_path, [Ticket(f"p{i}", tuple(names[i : i + 2]), by=BY) for i in range(4)])
    for id, choice in zip(ids, (0, "skip", "tie", 1), strict=True):
        answer(tmp_path, id, choice, BY)
    for id in reversed(ids):
        assert TicketState(tmp_path, BY).last == id
        take_back(tmp_path, id, BY)
        with pytest.raises(AnsweredError, match="no answer to take back"):
            take_back(tmp_path, id, BY)
    assert state(tmp_path) == (4, 0, 0, None) and pairs(tmp_path) == []
    assert [t.id for t in TicketState(tmp_path, BY).waiting] == ids


def test_a_second_answer_is_refused_and_the_same_one_is_heard_once(tmp_path, two):
    answer(tmp_path, two[0], 0, BY)
    answer(tmp_path, two[0], 0, BY)
    for other in (1, "tie", "skip"):
        with pytest.raises(AnsweredError, match="answered already: candidate 1"):
            answer(tmp_path, two[0], other, BY)
    assert len(rows(tmp_path)) == 1
    answer(tmp_path, two[1], "skip", BY)
    with pytest.raises(AnsweredError, match="answered already: skip"):
        answer(tmp_path, two[1], 0, BY)


@pytest.mark.parametrize("choice", [-1, 2, True, 0.0, None, "0", "undo", [0]])
def test_a_choice_that_is_none_is_refused(tmp_path, two, choice):
    with pytest.raises(ValueError, match="choice must be 0 to 1, tie or skip"):
        answer(tmp_path, two[0], choice, BY)
    assert state(tmp_path) == (2, 0, 0, None)


@pytest.mark.parametrize("id", ["", "../..", "0" * 32, 7, None, ["x"], {"x": 1}])
def test_a_forged_ticket_is_refused(tmp_path, two, id):
    for act in (lambda: answer(tmp_path, id, 0, BY), lambda: take_back(tmp_path, id, BY)):
        with pytest.raises(ValueError, match="no ticket"):
            act()
    with pytest.raises(ValueError, match="no ticket"):
        answer(tmp_path, two[0], 0, "you")


def test_no_folder_is_made_by_an_answer(tmp_path):
    with pytest.raises(ValueError, match="no ticket"):
        answer(tmp_path / "none", "0" * 32, 0, BY)
    assert not (tmp_path / "none").exists() and state(tmp_path / "none") == (0, 0, 0, None)


def test_what_is_no_question_is_refused(tmp_path, names):
    a, b, *_ = names
    bad = {
        "2 to 4 candidates": [(a,), (), tuple(names[:5])],
        "twice": [(a, a)],
        "is not what a file": [
            (a, "../other.png"), (a, "/etc/passwd"), (a, "images/../x.png"), (a, a + "\n"), (a, "pairs.jsonl"), (a, 3),
        ],
    }  # fmt: skip
    for message, given in bad.items():
        for candidates in given:
            with pytest.raises(ValueError, match=message):
                Ticket("a", candidates)
    for more in ({"prompt": "x" * 8193}, {"prompt": 3}, {"by": "x" * 201}, {"latents": ("latents/a.safetensors",) * 2}):
        with pytest.raises(ValueError):
            Ticket(**{"prompt": "a", "candidates": (a, b), **more})
    with pytest.raises(ValueError, match="is missing"):
        ask(tmp_path, [Ticket("a", (a, f"images/{'0' * 32}.png"))])
    assert not (tmp_path / tickets.TICKETS).exists()


def test_bad_lines_are_named_and_the_good_ones_asked(tmp_path, names, two):
    whole = (tmp_path / tickets.TICKETS).read_text().splitlines()
    good = json.loads(whole[0])
    bad = [
        "{", "[]", "3", "[" * 60_000, '{"id": "' + "x" * 70_000 + '"}', json.dumps(good | {"id": "0" * 32}),
        json.dumps(good | {"prompt": "forged"}), json.dumps(good | {"candidates": ["../a.png", names[0]]}),
        json.dumps(good | {"candidates": "ab"}), json.dumps(good | {"latents": {"a": 1}}), json.dumps({"id": 1}),
    ]  # fmt: skip
    unknown = [json.dumps({"skip": skip, "turn": turn}) for skip, turn in (("x", 1), ([1], 2), (None, "9"), (two, 3))]
    last = json.dumps({"skip": two[1], "turn": True})
    (tmp_path / tickets.TICKETS).write_text("\n".join([*whole, *bad, *unknown, last]) + '\n{"id": "torn', "utf-8")
    found = TicketState(tmp_path, BY)
    assert [t.id for t in found.waiting] == [two[0]] and found.answers == {two[1]: ("skip", 0)}
    assert len(found.problems) == len(bad) + 1 and "line 3: it is not finished" in found.problems[0]
    assert all(len(problem) < 260 for problem in found.problems)
    assert ask(tmp_path, [Ticket("new", tuple(names[4:6]), by=BY)]) and len(TicketState(tmp_path, BY).waiting) == 2


def test_lines_of_others_answer_no_ticket(tmp_path, names, two):
    a, b, c, _, *_ = names
    row = {"prompt": "a seven", "winner": a, "loser": b, "strength": None, "by": BY, "ticket": two[0], "turn": 1}
    for change in ({"ticket": "0" * 32}, {"ticket": [1]}, {"prompt": "other"}, {"by": "you"}, {"loser": c}):
        preferences.append(tmp_path, [row | change])
    preferences.append(tmp_path, [{**row, "strength": 2.0}])
    assert state(tmp_path)[0] == 2
    preferences.append(tmp_path, [row | {"turn": "many"}])
    assert state(tmp_path) == (1, 1, 0, two[0])


def test_pictures_that_went_away_are_not_asked_about(tmp_path, names, two):
    (tmp_path / names[0]).unlink()
    found = TicketState(tmp_path, BY)
    assert [t.id for t in found.waiting] == [two[1]] and "is missing" in found.problems[0]
    with pytest.raises(ValueError, match="is missing"):
        answer(tmp_path, two[0], 0, BY)
    (tmp_path / names[0]).symlink_to(tmp_path.parent / "other.png")
    (tmp_path.parent / "other.png").write_bytes(b"x")
    assert "or a link" in TicketState(tmp_path, BY).problems[0]


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_choice_that_was_half_written_waits_and_is_then_whole(tmp_path, names, kept):
    (id,) = ask(tmp_path, [Ticket("a", tuple(names[:4]), by=BY)])
    answer(tmp_path, id, 0, BY)
    path = tmp_path / preferences.PAIRS
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:kept]) + whole[kept][:50])
    assert state(tmp_path)[:2] == (1, 0)
    answer(tmp_path, id, 3, BY)
    found = pairs(tmp_path)
    assert {w for w, *_ in found} == {names[3]} and len(found) == 3 and state(tmp_path)[:2] == (0, 1)
    take_back(tmp_path, id, BY)
    assert pairs(tmp_path) == [] and state(tmp_path) == (1, 0, 0, None)


def test_a_half_written_choice_may_be_skipped(tmp_path, names):
    (id,) = ask(tmp_path, [Ticket("a", tuple(names[:4]), by=BY)])
    answer(tmp_path, id, 0, BY)
    path = tmp_path / preferences.PAIRS
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    answer(tmp_path, id, "skip", BY)
    assert pairs(tmp_path) == [] and state(tmp_path) == (0, 0, 1, id)


def test_a_contradiction_is_the_last_word_until_it_is_taken_back(tmp_path, names):
    a, b, c, *_ = names
    first, second = ask(tmp_path, [Ticket("a", (a, b), by=BY), Ticket("a", (a, b, c), by=BY)])
    answer(tmp_path, first, 0, BY)
    answer(tmp_path, second, 1, BY)
    assert (b, a, None, BY) in pairs(tmp_path) and (a, b, None, BY) not in pairs(tmp_path)
    assert "said the opposite" in preferences.read(tmp_path).problems[0]
    assert state(tmp_path) == (0, 2, 0, second)
    take_back(tmp_path, second, BY)
    assert pairs(tmp_path) == [(a, b, None, BY)] and state(tmp_path) == (1, 1, 0, first)


def _answer_many(folder, ids, choice, done):
    for id in ids:
        try:
            answer(folder, id, choice, BY)
            done.put(id)
        except AnsweredError:
            pass


def test_two_people_at_one_set(tmp_path, names):
    asked = [Ticket(f"p{i}", tuple(names[:2]), by=BY) for i in range(40)]
    ids = ask(tmp_path, asked)
    fork = multiprocessing.get_context("fork")
    done = fork.SimpleQueue()
    people = [fork.Process(target=_answer_many, args=(tmp_path, ids, choice, done)) for choice in (0, 1)]
    for person in people:
        person.start()
    while any(person.is_alive() for person in people):
        found = TicketState(tmp_path, BY)
        assert len(found.waiting) + len(found.answers) == 40
    for person in people:
        person.join()
    taken = []
    while not done.empty():
        taken.append(done.get())
    assert sorted(taken) == sorted(ids) and len(pairs(tmp_path)) == 40 and state(tmp_path)[:2] == (0, 40)
    turns = [turn for _, turn in TicketState(tmp_path, BY).answers.values()]
    assert sorted(turns) == list(range(1, 41))


def _answer_until_killed(folder, ids, pause=0.0):
    for id in ids:
        answer(folder, id, 0, BY)
        time.sleep(pause)


def test_a_killed_writer_leaves_a_set_that_goes_on(tmp_path, names):
    ids = ask(tmp_path, [Ticket(f"p{i}", tuple(names[:4]), by=BY) for i in range(120)])
    for _ in range(3):
        waiting = [t.id for t in TicketState(tmp_path, BY).waiting]
        # However fast the machine, the writer is in the middle of its list when it is killed.
        arguments = (tmp_path, waiting, 0.01)
        writer = multiprocessing.get_context("fork").Process(target=_answer_until_killed, args=arguments)
        writer.start()
        while len(TicketState(tmp_path, BY).waiting) == len(waiting):
            time.sleep(0.01)
        time.sleep(0.05)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        answer(tmp_path, TicketState(tmp_path, BY).waiting[-1].id, 1, BY)
    found = TicketState(tmp_path, BY)
    judged = found.count(skipped=False)
    assert 3 <= judged < 120 and judged + len(found.waiting) == len(ids)
    _answer_until_killed(tmp_path, [t.id for t in found.waiting])
    assert len(pairs(tmp_path)) == 360 and preferences.read(tmp_path).problems == ()


def test_tickets_are_asked_while_others_are_answered(tmp_path, names):
    problems = []

    def draw():
        for i in range(60):
            ask(tmp_path, [Ticket(f"p{i}", tuple(names[:2]), by=BY)])

    drawing = threading.Thread(target=draw)
    drawing.start()
    answered = 0
    while drawing.is_alive() or TicketState(tmp_path, BY).waiting:
        found = TicketState(tmp_path, BY)
        problems += [problem for problem in found.problems if "not finished" not in problem]
        if found.waiting:
            answer(tmp_path, found.waiting[0].id, 0, BY)
            answered += 1
    drawing.join()
    assert answered == 60 and state(tmp_path)[:2] == (0, 60) and not problems


def test_a_holder_that_does_not_let_go_is_told(tmp_path, two, monkeypatch):
    monkeypatch.setattr(tickets, "PATIENCE", 0.05)
    with locked(tmp_path, tickets.LOCK), pytest.raises(BlockingIOError, match="try again"):
        answer(tmp_path, two[0], 0, BY)


def test_who_drew_a_candidate_is_part_of_the_question_and_checked(tmp_path, names):
    a, b, *_ = names
    plain, one, other = (Ticket("a", (a, b), by=BY, models=models) for models in ((), ("x", "y"), ("y", "x")))
    turned = Ticket("a", (b, a), by=BY, models=("y", "x"))
    assert len({plain.id, one.id, other.id}) == 3 and turned.id == one.id
    ask(tmp_path, [plain, one])
    found = TicketState(tmp_path, BY)
    assert found.blind and [ticket.models for ticket in found.waiting] == [(), ("x", "y")]
    # Only a ticket that says who drew its candidates is counted.
    answer(tmp_path, plain.id, 1, BY)
    assert TicketState(tmp_path, BY).votes() == ({}, 0)
    answer(tmp_path, one.id, 1, BY)
    assert TicketState(tmp_path, BY).votes() == ({"y": 1}, 0)
    for models in (("x",), ("x", ""), ("x", 3)):
        with pytest.raises(ValueError, match="models must name who drew each of 2 candidates"):
            Ticket("a", (a, b), by=BY, models=models)
