"""The picker as a page of its own, for a phone in the same network: retort/pick, and where a phone finds this server.

The page holds nothing but the address of its script; what it shows it asks for by `picker_routes`, as ComfyUI's page
does. It loads nothing from elsewhere, and no other page may show it in a frame.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from aiohttp import web

from .guard import HEADERS, ROOT, guarded, stranger
from .help_routes import PAGE

POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
MOST_TEXT = 200  # of a name in a link
HERE = {"127.0.0.1", "localhost", "::1"}
# Names that stand for all addresses of a family, and an address of the networks for examples: nothing is sent there,
# the system only says from where it would be.
EVERYWHERE = {"0.0.0.0": (socket.AF_INET, "192.0.2.1"), "::": (socket.AF_INET6, "2001:db8::1")}


def add(table: web.RouteTableDef, listens: Callable[[], tuple[str, int, bool]]) -> None:
    """Add the routes. listens: gives the addresses, with commas between, the port, and whether it is by TLS."""

    async def page(request: web.Request) -> web.Response:
        # A link to it may stand on any page: it shows nothing by itself.
        if wrong := stranger(request.headers.getall("Host", []), [], []):
            raise web.HTTPForbidden(text=wrong)
        folders = import_module("nodes").EXTENSION_WEB_DIRS
        names = [name for name, place in folders.items() if Path(place).resolve() == PAGE]
        if not names:
            raise web.HTTPNotFound
        source = f"/extensions/{quote(names[0])}/picker/phone.mjs"
        text = (PAGE / "picker" / "phone.html").read_text(encoding="utf-8").replace("SCRIPT", source)
        return web.Response(text=text, content_type="text/html", headers=HEADERS | {"Content-Security-Policy": POLICY})

    def addresses(set: str = "", by: str = "") -> dict[str, Any]:
        names, port, safe = listens()
        found = reachable(names.split(","), own_address)
        where = f"{ROOT}/pick?{urlencode({'set': set[:MOST_TEXT], 'by': by[:MOST_TEXT]})}"
        links = [f"http{'s' if safe else ''}://{name}:{port}{where}" for name in found]
        return {"links": [{"link": link, "code": code(link)} for link in links]}

    table.get(f"{ROOT}/pick/addresses")(guarded(addresses))
    table.get(f"{ROOT}/pick")(page)


def code(link: str) -> str:
    """A QR code of a link, as the address of an SVG; "" where segno is not installed, or for more than a code holds."""
    try:
        import segno
    except ImportError:
        return ""
    try:
        return str(segno.make_qr(link).svg_data_uri(scale=5, border=4, light="#fff"))
    except segno.DataOverflowError:
        return ""


def reachable(names: Iterable[str], own: Callable[[str], str | None]) -> list[str]:
    """Of the names that a server listens at, those by which another machine reaches it.

    own: gives this machine's address of the family that a name in EVERYWHERE stands for.
    """
    given = [name.strip() for name in names if name.strip()]
    known = [own(name) for name in EVERYWHERE if name in given]
    whole = [address for address in known if address is not None and address not in HERE]
    # One of them is enough to type, of the shorter kind where there is one.
    found = [*whole[:1], *(name for name in given if name not in HERE and name not in EVERYWHERE)]
    return [f"[{name}]" if ":" in name else name for name in dict.fromkeys(found)]


def own_address(everywhere: str) -> str | None:
    """This machine's address in its network, of the family that a name in EVERYWHERE stands for; None without one."""
    family, elsewhere = EVERYWHERE[everywhere]
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as made:
            made.connect((elsewhere, 9))
            return str(made.getsockname()[0])
    except OSError:
        return None
