"""The help pages under the address that ComfyUI's page asks first, which names a language: no 404 in the console.

A page in that language is docs/NAME/LANGUAGE.md; where there is none, the English docs/NAME.md is given.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from aiohttp import web

PAGE = Path(__file__).resolve().parents[2] / "extensions" / "comfyui"
DOCS = PAGE / "docs"
NAMES = "{node:Retort[A-Za-z]+}/{language:[A-Za-z-]+}.md"


def add(table: web.RouteTableDef) -> None:
    """Add the route."""

    async def page(request: web.Request) -> web.FileResponse:
        node, language = request.match_info["node"], request.match_info["language"]
        found = [path for path in (DOCS / node / f"{language}.md", DOCS / f"{node}.md") if path.is_file()]
        if not found:
            raise web.HTTPNotFound
        headers = {"Content-Type": "text/markdown; charset=utf-8", "Cache-Control": "no-cache"}
        return web.FileResponse(found[0], headers=headers)

    # By our folder's own name: an address with a placeholder in its place would come after ComfyUI's for the folder.
    for name, folder in import_module("nodes").EXTENSION_WEB_DIRS.items():
        if Path(folder).resolve() == PAGE:
            table.get(f"/extensions/{name}/docs/{NAMES}")(page)
