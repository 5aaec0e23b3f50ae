"""Training runs on ComfyUI's server: the list, a run's log, its pictures, and its commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aiohttp import web

from .. import run_view
from .guard import ROOT, door, whole
from .work import runs_folder


def add(table: web.RouteTableDef) -> None:
    """Open the doors that the page asks at."""
    table.get(f"{ROOT}/runs")(door(_runs))
    table.get(f"{ROOT}/runs/{{run}}/log")(door(_log))
    table.get(f"{ROOT}/runs/{{run}}/previews/{{picture}}")(door(_picture))
    table.post(f"{ROOT}/runs/{{run}}/command")(door(_command))


def _runs() -> list[dict[str, Any]]:
    return run_view.runs(runs_folder())


def _log(run: str, offset: str = "0", step: str = "0") -> dict[str, Any]:
    found = run_view.run_folder(runs_folder(), run)
    return run_view.log(found, whole("offset", offset), whole("step", step))


def _picture(run: str, picture: str) -> Path:
    return run_view.picture(run_view.run_folder(runs_folder(), run), picture)


def _command(run: str, body: dict[str, Any]) -> None:
    run_view.command(run_view.run_folder(runs_folder(), run), str(body.get("command", "")))
