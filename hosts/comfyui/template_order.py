"""Our templates in an order to try them in: ComfyUI lists them as the file system happens to give them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable
from functools import cache
from pathlib import Path

from aiohttp import web

PATHS = ("/workflow_templates", "/api/workflow_templates")
FOLDER = Path(__file__).resolve().parents[2] / "workflows"


def listen(app: web.Application) -> None:
    """Put the list that a server sends in order, as long as it takes listeners."""
    if not app.middlewares.frozen:
        app.middlewares.append(_ordered)


@cache
def titles() -> tuple[str, ...]:
    """Those with a number first, then those that run anywhere, last those that need files; each by the alphabet."""

    def place(path: Path) -> tuple[bool, bool, str]:
        return not path.stem[0].isdigit(), '"directory"' in path.read_text(encoding="utf-8"), path.stem

    return tuple(path.stem for path in sorted(FOLDER.glob("*.json"), key=place))


def in_order(names: Iterable[str]) -> list[str]:
    """Names of templates, ours before others."""
    place = {title: number for number, title in enumerate(titles())}
    return sorted(names, key=lambda name: place.get(name, len(place)))


@web.middleware
async def _ordered(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    response = await handler(request)
    if request.path in PATHS and isinstance(response, web.Response) and response.status == 200 and response.text:
        packs = json.loads(response.text)
        response.text = json.dumps(
            {pack: in_order(names) if titles()[0] in names else names for pack, names in packs.items()}
        )
    return response
