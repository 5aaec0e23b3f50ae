"""Files of the page that ComfyUI alone would not serve so: help pages in a language, what they link to, later modules.

A page in that language is docs/NAME/LANGUAGE.md; where there is none, the English docs/NAME.md is given. The panel
opens links as they stand, so one that leads to docs/ in the repository is made to lead to our route for it.
Modules that end in .mjs are not loaded with ComfyUI's page, but when they are wanted. A browser may not keep them, as
it may not keep others: after an update all are of one version.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path

from aiohttp import web

from .guard import HEADERS, ROOT, stranger

_ROOT = Path(__file__).resolve().parents[2]
PAGE = _ROOT / "extensions" / "comfyui"
HELP = PAGE / "docs"
DETAILS = _ROOT / "docs"
NAMES = "{node:Retort[A-Za-z]+}/{language:[A-Za-z-]+}.md"


def add(table: web.RouteTableDef) -> None:
    """Add the routes."""

    async def page(request: web.Request) -> web.Response:
        node, language = request.match_info["node"], request.match_info["language"]
        found = [path for path in (HELP / node / f"{language}.md", HELP / f"{node}.md") if _there(path)]
        if not found:
            raise web.HTTPNotFound
        text = found[0].read_text(encoding="utf-8")
        for there in ("../../../docs/", "../../../../docs/"):
            text = text.replace(f"]({there}", f"]({ROOT}/docs/")
        return _sent(text, "text/markdown")

    async def details(request: web.Request) -> web.Response:
        if wrong := stranger(*(request.headers.getall(name, []) for name in ("Host", "Origin", "Sec-Fetch-Site"))):
            raise web.HTTPForbidden(text=wrong)
        path = DETAILS / f"{request.match_info['page']}.md"
        if not _there(path):
            raise web.HTTPNotFound
        # A browser shows plain text, and would save Markdown.
        return _sent(path.read_text(encoding="utf-8"), "text/plain")

    # By our folder's own name: an address with a placeholder in its place would come after ComfyUI's for the folder.
    for name, folder in import_module("nodes").EXTENSION_WEB_DIRS.items():
        if Path(folder).resolve() == PAGE:
            table.get(f"/extensions/{name}/docs/{NAMES}")(page)
            for path in PAGE.rglob("*.mjs"):
                table.get(f"/extensions/{name}/{path.relative_to(PAGE).as_posix()}")(partial(_module, path))
    table.get(f"{ROOT}/docs/{{page:[A-Za-z]+}}.md")(details)


def _there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than the system's longest
        return False


async def _module(path: Path, request: web.Request) -> web.Response:
    return _sent(path.read_text(encoding="utf-8"), "text/javascript")


def _sent(text: str, kind: str) -> web.Response:
    return web.Response(text=text, content_type=kind, charset="utf-8", headers=HEADERS)
