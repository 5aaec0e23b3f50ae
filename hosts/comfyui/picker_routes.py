"""Where Preference Picker's page asks and answers: a few routes on ComfyUI's server, for what waits beside the sets.

GET retort/picker/SET/tickets and images/ID, POST retort/picker/SET/answer and take_back; ?by= tells who picks. All but
pictures answer with the desk as it is. Whoever asks may be another site that the user has open: besides what core
checks, everything but a picture needs a header that no form or link of another site can send, and no script without
asking first, which core refuses. Names and numbers are checked here and by `trainers.tickets`, so that nothing outside
the set's folder is read or written, and no folder is made. A picture is a file that a ticket may name, sent as PNG
whatever is in it, and not lent to other sites.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from ...trainers import tickets
from ...trainers.files import checked_name
from ...trainers.preferences import NAME_LENGTH, trouble
from ...trainers.tickets import SKIP, AnsweredError, Desk, Ticket

PREFIX = "/retort/picker/{set}"
HEADER = "X-Retort-Picker"
BODY = 4096  # bytes
SHOWN = 16  # tickets that a page is told of at once
IMAGE = re.compile(r"[0-9a-f]{32}")
SAFE = {"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin"}
# A name is made of the content, which therefore never changes.
PICTURE = {
    **SAFE, "Content-Type": "image/png", "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cache-Control": "private, max-age=86400, immutable",
}  # fmt: skip


def add(table: web.RouteTableDef, sets_folder: Callable[[], Path]) -> None:
    """Register the routes."""
    Routes(sets_folder).add_to(table)


class Routes:
    """The handlers, for the sets of a folder, which is asked for each time: a user may move the output folder."""

    def __init__(self, sets_folder: Callable[[], Path]):
        self._sets_folder = sets_folder

    def add_to(self, table: web.RouteTableDef) -> None:
        """Register the handlers."""
        table.get(f"{PREFIX}/tickets")(self.look)
        table.get(f"{PREFIX}/images/{{image}}")(self.picture)
        table.post(f"{PREFIX}/answer")(self.answer)
        table.post(f"{PREFIX}/take_back")(self.take_back)

    async def look(self, request: web.Request) -> web.Response:
        """The desk."""
        return await self._act(request, (), lambda folder, by: None)

    async def answer(self, request: web.Request) -> web.Response:
        """{"id", "choice"}: answer a ticket; 409 when it has another answer."""
        return await self._act(
            request, ("id", "choice"), lambda folder, by, id, choice: tickets.answer(folder, id, choice, by)
        )

    async def take_back(self, request: web.Request) -> web.Response:
        """{"id"}: take an answer back; 409 when there is none."""
        return await self._act(request, ("id",), lambda folder, by, id: tickets.take_back(folder, id, by))

    async def picture(self, request: web.Request) -> web.StreamResponse:
        """A candidate."""
        name = request.match_info["image"]
        try:
            folder = self._folder(request)
        except ValueError as error:
            return _refusal(400, str(error))
        if not IMAGE.fullmatch(name) or await asyncio.to_thread(trouble, folder, f"images/{name}.png"):
            return _refusal(404, "there is no such picture")
        return web.FileResponse(folder / "images" / f"{name}.png", headers=PICTURE)

    def _folder(self, request: web.Request) -> Path:
        return self._sets_folder() / checked_name(request.match_info["set"])

    async def _act(self, request: web.Request, fields: tuple[str, ...], act: Callable[..., None]) -> web.Response:
        """Do what the fields of a request's body say, and answer with the desk, also where that was refused."""
        status, said = 200, ""
        try:
            if HEADER not in request.headers:
                return _refusal(403, f"only ComfyUI's own page asks here: the header {HEADER} is missing")
            folder, by = self._folder(request), request.query.get("by", "")
            if len(by) > NAME_LENGTH:
                raise ValueError(f"by has more than {NAME_LENGTH} characters")
            given = await _fields(request, fields) if fields else {}
            try:
                await asyncio.to_thread(act, folder, by, **given)
            except AnsweredError as error:
                status, said = 409, str(error)
            desk = await asyncio.to_thread(Desk, folder, by)
        except ValueError as error:
            return _refusal(400, str(error))
        except BlockingIOError as error:
            return _refusal(503, str(error))
        except OSError as error:
            return _refusal(500, f"the set cannot be read or written: {error.strerror}")
        return web.json_response(_spelled(desk) | {"error": said}, status=status, headers=SAFE)


async def _fields(request: web.Request, names: tuple[str, ...]) -> dict[str, Any]:
    if request.content_type != "application/json":
        raise ValueError(f"the body must be application/json, got {request.content_type:.80}")
    if request.content_length is None or request.content_length > BODY:
        raise ValueError(f"the body must say its length, of at most {BODY} bytes")
    try:
        given = json.loads(await request.read())
    except RecursionError as error:
        raise ValueError("the body is no plain JSON") from error
    if not isinstance(given, dict) or set(given) != set(names):
        raise ValueError(f"the body must be an object with {' and '.join(names)}")
    return given


def _spelled(desk: Desk) -> dict[str, Any]:
    """The desk as a page sees it: counts, the first that wait, and what was answered last."""
    last = desk.last
    return {
        "judged": desk.count(skipped=False),
        "skipped": desk.count(skipped=True),
        "waiting": len(desk.waiting),
        "tickets": [_shown(ticket) for ticket in desk.waiting[:SHOWN]],
        "last": None if last is None else {**_shown(desk.tickets[last]), "skipped": desk.answers[last][0] == SKIP},
        "problems": len(desk.problems),
    }


def _shown(ticket: Ticket) -> dict[str, Any]:
    return {"id": ticket.id, "prompt": ticket.prompt, "candidates": [Path(name).stem for name in ticket.candidates]}


def _refusal(status: int, said: str) -> web.Response:
    return web.json_response({"error": said}, status=status, headers=SAFE)
