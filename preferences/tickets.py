"""Questions about a set of preferences that wait for a person, and the person's answers.

A ticket is two to four candidates of one prompt, of which the best is asked for. It is a line of tickets.jsonl beside
pairs.jsonl, named by its content, so that the same question is asked once, however often it is drawn. Its answer is
what pairs.jsonl says of it: the lines of a choice carry "ticket" and "turn", and a choice counts when all its pairs are
there. So neither a page nor a restart nor a killed writer loses anything, and a set that was edited by hand tells what
is still to be asked. Only skips have lines in tickets.jsonl. Turns count up; the last one's answer is taken back first.

The best of n is n - 1 pairs, a tie all n (n - 1) / 2, of strength 0. The folder may be a stranger's, as the set may.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from ..files.folder import Inside, inside
from ..files.growing import Folders, Growing, Shelf
from .store import FOLDERS, LINE_BYTES, MOST_LINES, NAME_LENGTH, PAIRS, PROMPT_LENGTH, append

TICKETS, LOCK = "tickets.jsonl", "tickets.lock"
STATES = 4  # that are kept in memory
MOST_TURNS = 2**53  # what a page's numbers hold
PATIENCE = 5.0  # seconds until another writer must be done
PICTURE, LATENT = re.compile(r"images/([0-9a-f]{32})\.png"), re.compile(r"latents/[0-9a-f]{32}\.safetensors")
# The place of the best candidate, or what was said instead.
Choice = int | Literal["tie", "skip"]
TIE: Literal["tie"] = "tie"
SKIP: Literal["skip"] = "skip"


class AnsweredError(ValueError):
    """The ticket has another answer already, or none that could be taken back."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """A question: which of these pictures is best for the prompt? latents: what pairs name instead, where there are.

    reference: the picture that an edit model was shown, "" for other models.
    models: who drew each candidate, in a blind test, where nobody is told before the last answer.
    """

    prompt: str
    candidates: tuple[str, ...]
    latents: tuple[str, ...] = ()
    by: str = ""
    reference: str = ""
    models: tuple[str, ...] = ()

    def __post_init__(self):
        for name, text, most in (("prompt", self.prompt, PROMPT_LENGTH), ("by", self.by, NAME_LENGTH)):
            if not isinstance(text, str) or len(text) > most:
                raise ValueError(f"{name} must be a text of at most {most} characters, got {text!r:.40}")
            if not text.isascii() and text != text.encode(errors="replace").decode():
                raise ValueError(f"{name} holds half a character (a lone surrogate): {text!r:.40}")
        _check("candidates", self.candidates, PICTURE)
        if self.latents:
            _check("latents", self.latents, LATENT)
        if self.reference != "":
            _check("reference", (self.reference,), PICTURE)
        if not 2 <= len(self.candidates) <= 4:
            raise ValueError(f"there must be 2 to 4 candidates, got {len(self.candidates)}")
        if self.latents and len(self.latents) != len(self.candidates):
            raise ValueError(f"there are {len(self.candidates)} candidates and {len(self.latents)} latents")
        if self.models:
            named = all(isinstance(one, str) and 0 < len(one) <= NAME_LENGTH for one in self.models)
            if len(self.models) != len(self.candidates) or not named:
                raise ValueError(f"models must name who drew each of {len(self.candidates)} candidates")

    @property
    def id(self) -> str:
        """A name made of the question, whatever the order of its candidates."""
        # Spelled as json.dumps spells a list of them. The names of files hold nothing that JSON would spell.
        parts = [json.dumps(self.prompt), _listed(self.candidates), _listed(self.latents), json.dumps(self.by)]
        parts += [f'"{self.reference}"'] if self.reference else []
        if self.models:
            parts.append(json.dumps(sorted(zip(self.candidates, self.models, strict=True))))
        return hashlib.blake2b(f"[{', '.join(parts)}]".encode(), digest_size=16).hexdigest()

    @property
    def asks(self) -> tuple[str, str]:
        """For what the best is asked: the prompt, and the picture that was to be edited."""
        return self.prompt, self.reference

    @property
    def needs(self) -> tuple[str, ...]:
        """All files of the set that it names."""
        return (*self.candidates, *self.latents, *([self.reference] if self.reference else []))

    @property
    def files(self) -> tuple[str, ...]:
        """What pairs name."""
        return self.latents or self.candidates

    def pairs(self, choice: Choice) -> list[tuple[str, str, int | None]]:
        """(winner, loser, strength) of a choice. ValueError for a choice that it does not offer."""
        if choice == SKIP:
            return []
        if choice == TIE:
            return [(a, b, 0) for a, b in combinations(self.files, 2)]
        if isinstance(choice, bool) or not isinstance(choice, int) or not 0 <= choice < len(self.files):
            raise ValueError(f"choice must be 0 to {len(self.files) - 1}, tie or skip, got {choice!r:.40}")
        return [(self.files[choice], other, None) for other in self.files if other != self.files[choice]]


def _check(kind: str, names: tuple[str, ...], form: re.Pattern[str]) -> None:
    for name in names:
        if not isinstance(name, str) or not form.fullmatch(name):
            raise ValueError(f"{kind}: {name!r:.80} is not what a file of a set is called")
    if len(set(names)) < len(names):
        raise ValueError(f"{kind}: the same one is there twice")


def _listed(names: tuple[str, ...]) -> str:
    return '["' + '", "'.join(sorted(names)) + '"]' if names else "[]"


# A line of pairs.jsonl that belongs to a ticket: winner, loser, strength, turn. Plain tuples of plain values, since the
# garbage collector stops looking at those: of a large set, each of its rounds would hold up every thread for a while.
Said = tuple[str, str, float | None, int]


class TicketState:
    """What waits and what was answered in a folder, as its two files said at the last `refresh`; `by`: who is asked."""

    def __init__(self, folder: Path | Inside, by: str):
        self.folder, self.by = inside(folder), by
        self._questions = Growing(self.folder / TICKETS, LINE_BYTES, MOST_LINES)
        self._pairs = Growing(self.folder / PAIRS, LINE_BYTES, MOST_LINES)
        self._folders = Folders(self.folder, *FOLDERS)
        self._forget()
        self.refresh()

    def _forget(self) -> None:
        self._questions.forget()
        self._pairs.forget()
        self.tickets: dict[str, Ticket] = {}
        self.turn = 0  # the last one
        self.blind = False  # whether who drew what is kept until the last answer
        self.answers: dict[str, tuple[Choice, int]] = {}
        self.waiting: list[Ticket] = []  # the oldest first
        self._open: dict[str, Ticket] = {}
        self._last: str | None = None
        self._bad: list[str] = []
        self._missing: dict[str, str] = {}
        self._skips: dict[str, int] = {}
        self._said: dict[str, tuple[Said, ...]] = {}
        self._strange: set[str] = set()  # tickets that pairs name and that nobody has asked yet
        self._new: set[str] = set()
        self._touched: set[str] = set()

    def refresh(self) -> None:
        """Read what has come since."""
        if self._questions.moved() or self._pairs.moved():
            self._forget()
        for number, line in self._questions.lines():
            try:
                self._read_ticket(_object(line))
            except ValueError as error:
                self._bad.append(f"{TICKETS}, line {number}: {str(error)[:200]}")
        if self._new & self._strange:
            # Somebody has put the files together anew: what was said of these is behind.
            self._pairs.forget()
            self._said, self._strange = {}, set()
            self._touched |= set(self.tickets)
        for _, line in self._pairs.lines():
            if line is not None and b'"ticket"' in line:
                self._read_pair(_object(line))
        anew = self._folders.look()
        if not (anew or self._touched):
            return
        opened = anew or bool(self._new)
        for id in self._touched:
            before, found = self.answers.pop(id, None), self._answer(id, self.tickets[id])
            if found is not None:
                self.answers[id] = found
                self._open.pop(id, None)
            opened |= before is not None and found is None
        if self._last in self._touched:
            self._last = None  # looked for when it is asked for
        elif self._last is not None:
            now = (id for id in self._touched if id in self.answers)
            self._last = max((self._last, *now), key=lambda id: self.answers[id][1])
        for id in self.tickets if anew else self._touched:
            ticket = self.tickets[id]
            self._missing.pop(id, None)
            if id not in self.answers and (missing := set(ticket.needs) - self._folders.there):
                self._missing[id] = min(missing)
        self._new, self._touched = set(), set()
        if opened:
            lost = self._missing
            self._open = {id: t for id, t in self.tickets.items() if id not in self.answers and id not in lost}
        self.waiting = list(self._open.values())

    @property
    def problems(self) -> list[str]:
        """What is wrong with lines of questions, and with files that they name."""
        last = self._questions.unfinished
        torn = [] if last is None else [f"{TICKETS}, line {last}: it is not finished, or is no JSON"]
        lost = [f"ticket {id}: {name} is missing, or a link" for id, name in sorted(self._missing.items())]
        return [*self._bad, *torn, *lost]

    def _read_ticket(self, row: Mapping[str, Any] | None) -> None:
        if row is None:
            raise ValueError("it is not finished, or is no JSON")
        if "skip" in row:
            self.turn = max(self.turn, turn := _turn(row))
            id = row["skip"]
            if isinstance(id, str) and id in self.tickets:
                self._touched.add(id)
                self._skips.pop(id, None)
                if row.get("undo") is not True:
                    self._skips[id] = turn
            return
        lists = [row.get(name, []) for name in ("candidates", "latents", "models")]
        if not all(isinstance(one, list) for one in lists):
            raise ValueError("candidates, latents and models must be lists of names")
        candidates, latents, models = map(tuple, lists)
        given = row.get("prompt", None), candidates, latents, row.get("by", ""), row.get("reference", ""), models
        ticket = Ticket(*given)
        if row.get("id") != (id := ticket.id):
            raise ValueError(f"id {row.get('id')!r:.40} is not that of this question")
        if ticket.by == self.by and id not in self.tickets:
            self.tickets[id] = ticket
            self.blind |= bool(models)
            self._new.add(id)
            self._touched.add(id)

    def _read_pair(self, row: Mapping[str, Any] | None) -> None:
        if row is None:
            return  # `preferences.read` names it
        get = row.get
        self.turn = max(self.turn, turn := _turn(row))
        id, winner, loser, strength = get("ticket"), get("winner"), get("loser"), get("strength")
        if not isinstance(id, str):
            return
        ticket = self.tickets.get(id)
        if ticket is None:
            self._strange.add(id)
            return
        if get("prompt") != ticket.prompt or get("by") != ticket.by or get("reference", "") != ticket.reference:
            return
        if winner == loser or winner not in (files := ticket.files) or loser not in files:
            return
        self._touched.add(id)
        said = tuple(one for one in self._said.get(id, ()) if {winner, loser} != set(one[:2]))
        if get("undo") is not True and strength in (0, None):
            said += ((winner, loser, strength, turn),)
        self._said[id] = said

    def _answer(self, id: str, ticket: Ticket) -> tuple[Choice, int] | None:
        if id in self._skips:
            return SKIP, self._skips[id]
        said = self._said.get(id)
        if not said:
            return None
        count = len(ticket.files)
        if len(said) == 1 and count == 2:
            ((winner, _, strength, turn),) = said
            return (TIE if strength is not None else ticket.files.index(winner)), turn
        turn = max(turn for _, _, _, turn in said)
        ties = sum(strength is not None for _, _, strength, _ in said)
        if ties:
            return (TIE, turn) if ties == count * (count - 1) // 2 else None
        winners = {winner for winner, _, _, _ in said}
        if len(winners) == 1 and len(said) == count - 1:
            return ticket.files.index(winners.pop()), turn
        return None  # a writer was killed in the middle of it

    @property
    def last(self) -> str | None:
        """The ticket that was answered last."""
        if self._last is None and self.answers:
            self._last = max(self.answers, key=lambda id: self.answers[id][1])
        return self._last

    def count(self, *, skipped: bool) -> int:
        """How many were skipped, or how many were judged."""
        return len(self._skips) if skipped else len(self.answers) - len(self._skips)

    def votes(self) -> tuple[dict[str, int], int]:
        """(how often a candidate of each model was the best, ties), of tickets that say who drew their candidates."""
        found, ties = Counter[str](), 0
        for id, (choice, _) in self.answers.items():
            models = self.tickets[id].models
            if models and isinstance(choice, int):
                found[models[choice]] += 1
            ties += bool(models) and choice == TIE
        return dict(found), ties

    def rows(self, id: str, choice: Choice) -> list[dict[str, Any]]:
        """Lines for pairs.jsonl that make this the ticket's answer, whatever was half said before."""
        ticket = self.tickets[id]
        said: list[tuple] = [(w, x, s, {}) for w, x, s in ticket.pairs(choice)]
        keep = {frozenset((w, x)) for w, x, _, _ in said}
        left = [(w, x, s, {"undo": True}) for w, x, s, _ in self._said.get(id, ()) if frozenset((w, x)) not in keep]
        return [self._row(id, self.turn + 1, *one) for one in (*left, *said)]

    def undone(self, id: str) -> list[dict[str, Any]]:
        """Lines that take a ticket's pairs back, and say again what another ticket had said about one of them."""
        ticket, rows = self.tickets[id], []
        for winner, loser, strength, _ in self._said.get(id, ()):
            rows.append(self._row(id, self.turn + 1, winner, loser, strength, {"undo": True}))
            others = [
                (*one, other) for other, older in self._said.items() if other != id
                for one in older if {winner, loser} == set(one[:2]) and self.tickets[other].asks == ticket.asks
            ]  # fmt: skip
            if others:
                won, lost, strength, turn, other = max(others, key=lambda one: one[3])
                rows.append(self._row(other, turn, won, lost, strength, {}))
        return rows

    def _row(self, id: str, turn: int, winner: str, loser: str, strength: float | None, more: dict) -> dict[str, Any]:
        ticket = self.tickets[id]
        known = {"prompt": ticket.prompt, "winner": winner, "loser": loser, "strength": strength}
        if ticket.reference:
            known["reference"] = ticket.reference
        return {**known, "by": self.by, "ticket": id, "turn": turn, **more}


def _object(line: bytes | None) -> dict[str, Any] | None:
    """What a line holds, None where it is no object."""
    try:
        text = "" if line is None else line.decode().strip()
        row, end = _scan(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and end == len(text) else None


_scan = json.JSONDecoder().raw_decode
_states = Shelf(lambda root, parts, by: TicketState(Inside(root, *parts), by), STATES)


def at(folder: Path | Inside, by: str) -> AbstractContextManager[TicketState]:
    """The tickets of a folder as they are now, read on from the last time; nobody else uses it meanwhile."""
    place = inside(folder)
    return _states.take(place.root, place.parts, by)


def _turn(row: Mapping[str, Any]) -> int:
    turn = row.get("turn")
    return turn if isinstance(turn, int) and not isinstance(turn, bool) and 0 < turn < MOST_TURNS else 0


def ask(folder: Path | Inside, tickets: Sequence[Ticket]) -> list[str]:
    """Let tickets wait whose files the folder holds; the ids of those that had not been asked.

    ValueError for a file that is not there; then none waits.
    """
    with _alone(folder):
        new: dict[str, Ticket] = {}
        for by in {ticket.by for ticket in tickets}:
            with at(folder, by) as state:
                mine = {ticket.id: ticket for ticket in tickets if ticket.by == by}
                new |= {id: ticket for id, ticket in mine.items() if id not in state.tickets}
        lines = []
        for id, ticket in new.items():
            for name in ticket.needs:
                if not (inside(folder) / name).is_file():
                    raise ValueError(f"{name} is missing in {folder}")
            row = {"id": id, "prompt": ticket.prompt, "candidates": ticket.candidates, "by": ticket.by}
            more = {"latents": ticket.latents, "reference": ticket.reference, "models": ticket.models}
            lines.append(_line(row | {name: value for name, value in more.items() if value}))
        if lines:
            (inside(folder) / TICKETS).append(lines)
    return list(new)


def answer(folder: Path | Inside, id: str, choice: Choice, by: str) -> None:
    """Write an answer; the same one again changes nothing.

    ValueError for a ticket or a choice that there is not, AnsweredError when it has another answer.
    """
    with _held(folder, id, by) as state:
        rows = state.rows(id, choice)
        if id in state.answers:
            if state.answers[id][0] == choice:
                return
            raise AnsweredError(f"it was answered already: {_words(state.answers[id][0])}")
        append(folder, rows)
        if choice == SKIP:
            (state.folder / TICKETS).append([_line({"skip": id, "turn": state.turn + 1})])


def take_back(folder: Path | Inside, id: str, by: str) -> None:
    """Take the answer of a ticket back, which then waits again.

    ValueError for a ticket that there is not, AnsweredError when it has no answer.
    """
    with _held(folder, id, by) as state:
        if id not in state.answers:
            raise AnsweredError("there is no answer to take back")
        if state.answers[id][0] == SKIP:
            (state.folder / TICKETS).append([_line({"skip": id, "turn": state.turn + 1, "undo": True})])
        append(folder, state.undone(id))


def _line(row: Mapping[str, Any]) -> bytes:
    return (json.dumps(row) + "\n").encode()


def _words(choice: Choice) -> str:
    return f"candidate {choice + 1}" if isinstance(choice, int) else choice


@contextlib.contextmanager
def _held(folder: Path | Inside, id: str, by: str) -> Iterator[TicketState]:
    """The tickets among which one is, with nobody else writing."""
    # Asked before the lock, which would make the folder.
    if isinstance(id, str) and (inside(folder) / TICKETS).is_file():
        with _alone(folder), at(folder, by) as state:
            if id in state.tickets:
                yield state
                return
    raise ValueError(f"there is no ticket {id!r:.40} in {folder.name}")


@contextlib.contextmanager
def _alone(folder: Path | Inside) -> Iterator[None]:
    """Hold the folder's tickets, waiting for another writer. BlockingIOError when that takes too long."""
    end = time.monotonic() + PATIENCE
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context((inside(folder) / LOCK).locked())
                break
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise BlockingIOError(f"the tickets of {folder} are held by another process: try again") from error
                time.sleep(0.01)
        yield
