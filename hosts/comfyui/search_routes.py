"""Searches on ComfyUI's server: the list, one with its tree, its pictures, and a latent taken from it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from ..search import view as search_view
from .guard import ROOT, guarded, whole


def add(
    table: web.RouteTableDef, records: Callable[[], Path], saved: Callable[[], Path], inputs: Callable[[], Path]
) -> None:
    """Add the routes that the page asks. records, saved, inputs: give the folders, which a user may move."""

    def every() -> dict[str, Any]:
        return search_view.searches(records(), saved(), os.getpid())

    def one(search: str) -> dict[str, Any]:
        return search_view.record(records(), search, os.getpid())

    def picture(search: str, item: str, number: str) -> Path:
        return search_view.picture(records(), search, whole("item", item), whole("number", number))

    def take(search: str, body: dict[str, Any]) -> dict[str, Any]:
        item, number = (whole(name, str(body.get(name, ""))) for name in ("item", "number"))
        return {"file": search_view.take(records(), inputs(), search, item, number)}

    table.get(f"{ROOT}/searches")(guarded(every))
    table.get(f"{ROOT}/searches/{{search}}")(guarded(one))
    table.get(f"{ROOT}/searches/{{search}}/{{item}}/{{number}}.jpg")(guarded(picture))
    table.post(f"{ROOT}/searches/{{search}}/take")(guarded(take))
