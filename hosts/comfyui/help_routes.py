"""The help pages under the address that ComfyUI's page asks first, which names a language: no 404 in the console.

A page in that language is docs/NAME/LANGUAGE.md; where there is none, the English docs/NAME.md is given.
"""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

DOCS = Path(__file__).resolve().parents[2] / "extensions" / "comfyui" / "docs"
# No other pack has nodes of these names, whatever the folder of this one is called.
ADDRESS = "/extensions/{pack}/docs/{node:Retort[A-Za-z]+}/{language:[A-Za-z-]+}.md"


def add(table: web.RouteTableDef) -> None:
    """Add the route."""

    async def page(request: web.Request) -> web.FileResponse:
        node, language = request.match_info["node"], request.match_info["language"]
        found = [path for path in (DOCS / node / f"{language}.md", DOCS / f"{node}.md") if path.is_file()]
        if not found:
            raise web.HTTPNotFound
        headers = {"Content-Type": "text/markdown; charset=utf-8", "Cache-Control": "no-cache"}
        return web.FileResponse(found[0], headers=headers)

    table.get(ADDRESS)(page)
