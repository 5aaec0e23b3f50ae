"""Preference sets on ComfyUI's server: the list, and one. Its pictures come by `picker_routes`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from .. import preference_view
from .guard import ROOT, guarded


def add(table: web.RouteTableDef, sets: Callable[[], Path]) -> None:
    """Add the routes that the page asks. sets: gives the folder of sets, which a user may move."""

    def every() -> list[dict[str, Any]]:
        return preference_view.every(sets())

    def one(name: str) -> dict[str, Any]:
        return preference_view.one(sets(), name)

    table.get(f"{ROOT}/preferences")(guarded(every))
    table.get(f"{ROOT}/preferences/{{name}}")(guarded(one))
