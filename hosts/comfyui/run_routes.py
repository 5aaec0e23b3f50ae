"""Training runs on ComfyUI's server: the list, a run's log, its pictures, and its commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from aiohttp import web

from ..jobs import graph as run_graph
from ..jobs import manage
from ..jobs import view as run_view
from .guard import ROOT, guarded, handed_out, whole


def add(table: web.RouteTableDef, runs: Callable[[], Path], loras: Callable[[], Path]) -> None:
    """Add the routes that the page asks. runs, loras: give the folders, which a user may move."""

    def every() -> list[dict[str, Any]]:
        return run_view.runs(runs())

    def log(run: str, offset: str = "0", step: str = "0") -> dict[str, Any] | None:
        try:
            found = run_view.run_folder(runs(), run)
        except FileNotFoundError:
            # A page asks for a run before it begins, and for one that was made elsewhere: no mistake to report there.
            return None
        return run_view.log(found, whole("offset", offset), whole("step", step))

    def about(run: str) -> dict[str, Any]:
        return run_view.about(run_view.run_folder(runs(), run))

    def graph(run: str) -> dict[str, Any] | None:
        try:
            return run_graph.of_run(run_view.run_folder(runs(), run))
        except FileNotFoundError:
            # Its LoRA is opened without.
            return None

    def keep(run: str, body: dict[str, Any]) -> dict[str, Any]:
        wanted = body.get("name")
        if not isinstance(wanted, str):
            raise ValueError("the body must give the LoRA's name as a text")
        return {"lora": manage.keep(runs(), loras(), run, whole("step", str(body.get("step", ""))), wanted)}

    def picture(run: str, picture: str) -> Path:
        return run_view.picture(run_view.run_folder(runs(), run), picture)

    def command(run: str, body: dict[str, Any]) -> None:
        run_view.command(run_view.run_folder(runs(), run), str(body.get("command", "")))

    def delete(run: str, body: dict[str, Any]) -> None:
        # Said twice, so that no other request deletes anything.
        if body.get("name") != run:
            raise ValueError("the body must name the run that is to be deleted")
        manage.delete(runs(), run)

    def rename(run: str, body: dict[str, Any]) -> None:
        wanted = body.get("name")
        if not isinstance(wanted, str):
            raise ValueError("the body must give the run's new name as a text")
        manage.rename(runs(), run, wanted)

    def export(run: str) -> BinaryIO:
        return manage.export(runs(), loras(), run)

    table.get(f"{ROOT}/runs")(guarded(every))
    table.post(f"{ROOT}/runs/{{run}}/delete")(guarded(delete))
    table.post(f"{ROOT}/runs/{{run}}/rename")(guarded(rename))
    table.get(f"{ROOT}/runs/{{run}}/export.zip")(handed_out(export, "application/zip"))
    table.get(f"{ROOT}/runs/{{run}}/about")(guarded(about))
    table.get(f"{ROOT}/runs/{{run}}/graph")(guarded(graph))
    table.post(f"{ROOT}/runs/{{run}}/keep")(guarded(keep))
    table.get(f"{ROOT}/runs/{{run}}/log")(guarded(log))
    table.get(f"{ROOT}/runs/{{run}}/previews/{{picture}}")(guarded(picture))
    table.post(f"{ROOT}/runs/{{run}}/command")(guarded(command))
