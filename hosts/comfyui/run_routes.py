"""Training runs on ComfyUI's server: the list, a run's log, its pictures, and its commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from ..jobs import view as run_view
from .guard import ROOT, guarded, whole


def add(table: web.RouteTableDef, runs: Callable[[], Path]) -> None:
    """Add the routes that the page asks. runs: gives the folder of runs, which a user may move."""

    def every() -> list[dict[str, Any]]:
        return run_view.runs(runs())

    def log(run: str, offset: str = "0", step: str = "0") -> dict[str, Any] | None:
        try:
            found = run_view.run_folder(runs(), run)
        except FileNotFoundError:
            # A page asks for a run before it begins, and for one that was made elsewhere: no mistake to report there.
            return None
        return run_view.log(found, whole("offset", offset), whole("step", step))

    def picture(run: str, picture: str) -> Path:
        return run_view.picture(run_view.run_folder(runs(), run), picture)

    def command(run: str, body: dict[str, Any]) -> None:
        run_view.command(run_view.run_folder(runs(), run), str(body.get("command", "")))

    table.get(f"{ROOT}/runs")(guarded(every))
    table.get(f"{ROOT}/runs/{{run}}/log")(guarded(log))
    table.get(f"{ROOT}/runs/{{run}}/previews/{{picture}}")(guarded(picture))
    table.post(f"{ROOT}/runs/{{run}}/command")(guarded(command))
