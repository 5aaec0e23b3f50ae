"""Searches on ComfyUI's server: the list, one with its tree, its pictures, and a latent taken from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from aiohttp import web

from .. import search_view
from ..search_files import FOLDER
from .guard import ROOT, door, whole
from .work import input_folders, runs_folder, search_records


def add(table: web.RouteTableDef) -> None:
    """Open the doors that the page asks at."""
    table.get(f"{ROOT}/searches")(door(_searches))
    table.get(f"{ROOT}/searches/{{search}}")(door(_search))
    table.get(f"{ROOT}/searches/{{search}}/{{item}}/{{number}}.jpg")(door(_picture))
    table.post(f"{ROOT}/searches/{{search}}/take")(door(_take))


def _searches() -> dict[str, Any]:
    return search_view.searches(search_records(), runs_folder().with_name(FOLDER), os.getpid())


def _search(search: str) -> dict[str, Any]:
    return search_view.record(search_records(), search, os.getpid())


def _picture(search: str, item: str, number: str) -> Path:
    return search_view.picture(search_records(), search, whole("item", item), whole("number", number))


def _take(search: str, body: dict[str, Any]) -> dict[str, Any]:
    item, number = (whole(name, str(body.get(name, ""))) for name in ("item", "number"))
    return {"file": search_view.take(search_records(), input_folders()[0], search, item, number)}
