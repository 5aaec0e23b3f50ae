"""Help pages by language, and the details that they link to, on a server of their own."""

from __future__ import annotations

import asyncio
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("aiohttp")

from aiohttp import web  # noqa: E402
from aiohttp.test_utils import TestClient, TestServer  # noqa: E402

from retort.hosts.comfyui import help_routes  # noqa: E402


@pytest.fixture
def get(monkeypatch):
    """get(path) -> (status, content type, text), where ComfyUI has our folder under the name "ours"."""
    monkeypatch.setitem(sys.modules, "nodes", SimpleNamespace(EXTENSION_WEB_DIRS={"ours": str(help_routes.PAGE)}))
    table = web.RouteTableDef()
    help_routes.add(table)

    def one(path):
        async def whole():
            app = web.Application()
            app.add_routes(table)
            async with TestClient(TestServer(app)) as client:
                answer = await client.get(path)
                return answer.status, answer.content_type, await answer.text()

        return asyncio.run(whole())

    return one


def test_a_link_into_the_repository_leads_to_our_route(get):
    status, kind, text = get("/extensions/ours/docs/RetortRestore/fr.md")
    assert (status, kind) == (200, "text/markdown") and "../docs/" not in text
    (link,) = [part.partition(")")[0] for part in text.split("](") if part.startswith("/")]
    status, kind, text = get(link)
    assert (status, kind) == (200, "text/plain")
    assert text == (help_routes.DETAILS / "RetortRestore.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path",
    ["/retort/docs/RetortNothing.md", "/retort/docs/..%2FREADME.md", "/retort/docs/.md", "/retort/docs/a/b.md",
     "/extensions/ours/docs/RetortNothing/en.md", "/extensions/ours/docs/..%2F..%2Fpanel/en.md",
     "/extensions/ours/docs/RetortRestore/..%2Fen.md", f"/retort/docs/{'x' * 300}.md",
     f"/extensions/ours/docs/Retort{'x' * 300}/en.md", f"/extensions/ours/docs/RetortRestored/{'x' * 300}.md"],
)  # fmt: skip
def test_nothing_else_is_given(get, path):
    assert get(path)[0] == 404
