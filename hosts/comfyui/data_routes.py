"""Data to train on, on ComfyUI's server: folders of pictures with captions, and the pairs of sets, page by page.

Pictures of folders come by ComfyUI's own address for the input folder, those of sets by `picker_routes`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from .. import data_view
from .guard import ROOT, ConflictError, guarded, whole


def add(table: web.RouteTableDef, sets: Callable[[], Path], inputs: Callable[[], Path]) -> None:
    """Add the routes that the page asks. sets, inputs: give the folders, which a user may move."""

    def every() -> list[dict[str, Any]]:
        return data_view.folders(inputs())

    def pictures(folder: str, offset: str = "0", find: str = "", marked: str = "", out: str = "") -> dict[str, Any]:
        return data_view.pictures(inputs(), folder, whole("offset", offset), find, marked == "1", out == "1")

    def take_out_picture(folder: str, body: dict[str, Any]) -> None:
        data_view.take_out_picture(inputs(), folder, str(body.get("name", "")))

    def put_back_picture(folder: str, body: dict[str, Any]) -> None:
        data_view.put_back_picture(inputs(), folder, str(body.get("name", "")))

    def caption(folder: str, body: dict[str, Any]) -> dict[str, Any]:
        if set(body) != {"name", "caption", "before"} or not all(isinstance(one, str) for one in body.values()):
            raise ValueError("the body must be an object with name, caption and before, which are texts")
        try:
            return {"version": data_view.write_caption(inputs(), folder, **body)}
        except data_view.ChangedError as error:
            raise ConflictError(str(error), vars(error.now)) from error

    def pairs(name: str, offset: str = "0", find: str = "") -> dict[str, Any]:
        return data_view.pairs(sets(), name, whole("offset", offset), find)

    def take_out(name: str, body: dict[str, Any]) -> None:
        data_view.take_out(sets(), name, whole("line", str(body.get("line", ""))))

    def put_back(name: str, body: dict[str, Any]) -> None:
        data_view.put_back(sets(), name, whole("line", str(body.get("line", ""))))

    table.get(f"{ROOT}/data")(guarded(every))
    table.get(f"{ROOT}/data/{{folder}}")(guarded(pictures))
    table.post(f"{ROOT}/data/{{folder}}/caption")(guarded(caption))
    table.post(f"{ROOT}/data/{{folder}}/take_out")(guarded(take_out_picture))
    table.post(f"{ROOT}/data/{{folder}}/put_back")(guarded(put_back_picture))
    table.get(f"{ROOT}/preferences/{{name}}/pairs")(guarded(pairs))
    table.post(f"{ROOT}/preferences/{{name}}/take_out")(guarded(take_out))
    table.post(f"{ROOT}/preferences/{{name}}/put_back")(guarded(put_back))
