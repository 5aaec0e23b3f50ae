"""Where Preference Picker's page asks and answers, on ComfyUI's server: what waits beside the sets.

GET retort/picker/SET/tickets and images/ID, POST retort/picker/SET/answer and take_back; ?by= tells who picks. All but
pictures answer with the tickets as they are. Names and numbers are checked here and by `preferences.tickets`, so that
nothing outside the set's folder is read or written, and no folder is made. A picture is a file that a ticket may name,
sent as PNG whatever is in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from ...files.atomic import checked_name
from ...preferences import tickets
from ...preferences.store import NAME_LENGTH, trouble
from ...preferences.tickets import SKIP, AnsweredError, Ticket, TicketState
from ..compare import BASE, TUNED
from ..patience import soon
from .guard import ROOT, ConflictError, guarded

SHOWN = 16  # tickets that a page is told of at once
IMAGE = re.compile(r"[0-9a-f]{32}")


def add(table: web.RouteTableDef, sets: Callable[[], Path]) -> None:
    """Add the routes that the page asks. sets: gives the folder of sets, which a user may move."""

    def place(name: str) -> Path:
        folder = sets() / checked_name(name)
        if folder.is_symlink():
            raise ValueError(f"the set {name!r:.140} is a link to another place")
        return folder

    def look(set: str, by: str = "") -> dict[str, Any]:
        folder = read(set, by)
        with tickets.at(folder, by) as state:
            return _spelled(state)

    def read(set: str, by: str) -> Path:
        """The folder of a set whose tickets are read. BlockingIOError while a large one is read for the first time."""
        folder = place(set)
        soon(("tickets", folder, _checked(by)), f"the set {set}", lambda: fetch(folder, by))
        return folder

    def fetch(folder: Path, by: str) -> None:
        with tickets.at(folder, by):
            pass

    def answer(set: str, body: dict[str, Any], by: str = "") -> dict[str, Any]:
        id, choice = _fields(body, "id", "choice")
        return act(set, by, lambda folder: tickets.answer(folder, id, choice, by))

    def take_back(set: str, body: dict[str, Any], by: str = "") -> dict[str, Any]:
        (id,) = _fields(body, "id")
        return act(set, by, lambda folder: tickets.take_back(folder, id, by))

    def act(set: str, by: str, work: Callable[[Path], None]) -> dict[str, Any]:
        folder = read(set, by)
        try:
            work(folder)
        except AnsweredError as error:
            with tickets.at(folder, by) as state:
                raise ConflictError(str(error), _spelled(state)) from error
        with tickets.at(folder, by) as state:
            return _spelled(state)

    def picture(set: str, image: str) -> Path:
        folder = place(set)
        if not IMAGE.fullmatch(image) or trouble(folder, f"images/{image}.png"):
            raise FileNotFoundError("there is no such picture")
        return folder / "images" / f"{image}.png"

    prefix = f"{ROOT}/picker/{{set}}"
    table.get(f"{prefix}/tickets")(guarded(look))
    # A name is made of the content.
    table.get(f"{prefix}/images/{{image}}")(guarded(picture, lasting=True))
    table.post(f"{prefix}/answer")(guarded(answer))
    table.post(f"{prefix}/take_back")(guarded(take_back))


def _checked(by: str) -> str:
    if len(by) > NAME_LENGTH:
        raise ValueError(f"by has more than {NAME_LENGTH} characters")
    return by


def _fields(body: dict[str, Any], *names: str) -> list[Any]:
    if set(body) != set(names):
        raise ValueError(f"the body must be an object with {' and '.join(names)}")
    return [body[name] for name in names]


def _spelled(state: TicketState) -> dict[str, Any]:
    """The tickets as a page sees them: counts, the first that wait, and what was answered last."""
    last = state.last
    return {
        "judged": state.count(skipped=False),
        "skipped": state.count(skipped=True),
        "waiting": len(state.waiting),
        "tickets": [_shown(ticket) for ticket in state.waiting[:SHOWN]],
        "last": None if last is None else {**_shown(state.tickets[last]), "skipped": state.answers[last][0] == SKIP},
        "problems": len(state.problems),
        **({"blind": True, "result": _result(state)} if state.blind else {}),
    }


def _result(state: TicketState) -> dict[str, Any] | None:
    """Of a blind test nothing while something waits, then how often the tuned model won and how sure that is."""
    votes, ties = state.votes()
    if state.waiting or not (votes or ties):
        return None
    # scipy, which it needs, takes a second to import.
    from ...rewards.comparison import Comparison

    found = Comparison(votes.get(TUNED, 0), votes.get(BASE, 0), ties)
    low, high = found.interval()
    return {"wins": found.wins, "of": found.wins + found.losses, "ties": ties, "low": low, "high": high}


def _shown(ticket: Ticket) -> dict[str, Any]:
    shown = {"id": ticket.id, "prompt": ticket.prompt, "candidates": [Path(name).stem for name in ticket.candidates]}
    return shown | ({"reference": Path(ticket.reference).stem} if ticket.reference else {})
