"""The picker's page for a phone: what it may load, who is refused, and where it is said to be."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
from types import ModuleType

import pytest

pytest.importorskip("aiohttp")

from aiohttp import web  # noqa: E402
from aiohttp.test_utils import TestClient, TestServer  # noqa: E402

from retort.hosts.comfyui import help_routes, phone_routes  # noqa: E402


@pytest.fixture
def ask(monkeypatch):
    """ask(path, headers) -> (status, headers, text) of a server that listens everywhere."""
    nodes = ModuleType("nodes")
    nodes.EXTENSION_WEB_DIRS = {"other": "/elsewhere", 'my "retort"': str(phone_routes.PAGE)}
    monkeypatch.setitem(sys.modules, "nodes", nodes)

    def one(path, headers=None):
        async def whole():
            table = web.RouteTableDef()
            phone_routes.add(table, lambda: ("0.0.0.0", 8188, False))
            app = web.Application()
            app.add_routes(table)
            async with TestClient(TestServer(app)) as client:
                answer = await client.get(f"/retort/{path}", headers=headers)
                return answer.status, answer.headers, await answer.text()

        return asyncio.run(whole())

    return one


def test_the_page_loads_only_its_own_script(ask):
    """Nothing of the query is in it, no other page may frame it, and the script is the file beside it."""
    status, headers, text = ask("pick?set=%3Cscript%3Ealert(1)%3C/script%3E&by=me")
    assert status == 200 and headers["Content-Type"].startswith("text/html")
    assert "alert" not in text
    assert re.findall(r'src="([^"]*)"', text) == ["/extensions/my%20%22retort%22/picker/phone.mjs"]
    policy = headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "script-src" not in policy
    assert headers["Cache-Control"] == "no-store"


def test_a_name_that_leads_here_from_elsewhere_is_refused(ask):
    for path in ("pick", "pick/addresses"):
        assert ask(path, {"Host": "evil.example:8188"})[0] == 403
    assert ask("pick/addresses", {"Origin": "http://evil.example"})[0] == 403


def test_a_link_comes_with_its_code(ask, monkeypatch):
    """The link is whole and says the set; without segno, or where it is too long for a code, the link comes alone."""
    pytest.importorskip("segno")
    monkeypatch.setattr(phone_routes, "own_address", lambda name: "192.168.1.5")
    status, _, text = ask("pick/addresses?set=my%20%26%20set&by=me")
    ((found),) = json.loads(text)["links"]
    assert status == 200 and found["link"] == "http://192.168.1.5:8188/retort/pick?set=my+%26+set&by=me"
    assert found["code"].startswith("data:image/svg+xml") and "%3Cpath" in found["code"]
    assert found["code"] != phone_routes.code(found["link"] + "2") and phone_routes.code("x" * 5000) == ""
    monkeypatch.setitem(sys.modules, "segno", None)
    assert json.loads(ask("pick/addresses?set=a&by=me")[2])["links"][0]["code"] == ""


@pytest.mark.parametrize(
    ("names", "own", "expected"),
    [
        ("127.0.0.1", "192.168.1.5", []), ("localhost,::1", "192.168.1.5", []),
        ("0.0.0.0,::", "192.168.1.5", ["192.168.1.5"]), ("0.0.0.0", None, []), ("0.0.0.0", "127.0.0.1", []),
        ("studio.lan", "192.168.1.5", ["studio.lan"]), ("fe80::1", None, ["[fe80::1]"]),
        ("192.168.1.5, 0.0.0.0", "192.168.1.5", ["192.168.1.5"]), ("::", "192.168.1.5", []),
    ],
)  # fmt: skip
def test_only_addresses_that_reach_it_are_told(names, own, expected):
    assert phone_routes.reachable(names.split(","), {"0.0.0.0": own, "::": None}.get) == expected


def test_a_server_that_listens_by_one_family_is_told_by_that_family():
    own = {"0.0.0.0": "192.168.1.5", "::": "2001:db8::5"}.get
    assert phone_routes.reachable(["::"], own) == ["[2001:db8::5]"]
    assert phone_routes.reachable(["0.0.0.0"], own) == ["192.168.1.5"]
    assert phone_routes.reachable(["0.0.0.0", "::"], own) == ["192.168.1.5"]


@pytest.mark.parametrize(("name", "family"), [("0.0.0.0", socket.AF_INET), ("::", socket.AF_INET6)])
def test_an_address_is_asked_of_its_own_family(monkeypatch, name, family):
    asked = []

    class Socket:
        def __init__(self, *given):
            asked.append(given)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def connect(self, _):
            raise OSError("unreachable")

    monkeypatch.setattr(phone_routes.socket, "socket", Socket)
    assert phone_routes.own_address(name) is None and asked == [(family, socket.SOCK_DGRAM)]


def test_modules_that_come_later_are_of_the_same_version(monkeypatch):
    """Each .mjs of the page is sent as a script that no browser keeps."""
    nodes = ModuleType("nodes")
    nodes.EXTENSION_WEB_DIRS = {"retort": str(phone_routes.PAGE)}
    monkeypatch.setitem(sys.modules, "nodes", nodes)

    async def whole():
        table = web.RouteTableDef()
        help_routes.add(table)
        app = web.Application()
        app.add_routes(table)
        async with TestClient(TestServer(app)) as client:
            for path in phone_routes.PAGE.rglob("*.mjs"):
                answer = await client.get(f"/extensions/retort/{path.relative_to(phone_routes.PAGE).as_posix()}")
                assert (answer.status, answer.content_type) == (200, "text/javascript"), path
                assert answer.headers["Cache-Control"] == "no-store"
                assert await answer.text() == path.read_text(encoding="utf-8")

    asyncio.run(whole())
