"""Doors of ours on ComfyUI's server: for its own page alone, whatever the request says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

ROOT = "/retort"
MOST_BYTES = 1 << 16
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}  # fmt: skip
# Whatever a picture's file holds, nothing in it runs.
SEALED = {"Content-Security-Policy": "default-src 'none'; sandbox"}
LASTING = {"Cache-Control": "private, max-age=86400, immutable"}
PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
Answer = dict[str, Any] | list[Any] | Path | None


class ConflictError(Exception):
    """What was asked for cannot be any more; `answer` says how things stand."""

    def __init__(self, why: str, answer: dict[str, Any]):
        super().__init__(why)
        self.answer = answer


def door(work: Callable[..., Answer], lasting: bool = False) -> Callable[[web.Request], Any]:
    """A handler that runs `work(**names in the path, **query, body=...)` off the event loop.

    What comes back is sent as JSON, a Path as a picture; lasting: what is at an address never changes. body: of a POST,
    a JSON object of at most 64 kB. ValueError and TypeError become 400, FileNotFoundError 404, ConflictError 409 with
    its answer, BlockingIOError 503 and another OSError 500, each with `error` saying why; what another page asks for is
    refused with 403.
    """

    async def handle(request: web.Request) -> web.Response:
        if not _own(request):
            return _refuse(403, "only ComfyUI's own page may ask for this")
        names: dict[str, Any] = {**request.query, **request.match_info}
        if request.method == "POST":
            # Another page can send text or a form without asking the browser's leave, but not this.
            if request.content_type != "application/json":
                return _refuse(415, "send application/json")
            if (request.content_length or 0) > MOST_BYTES:
                return _refuse(413, f"the body is larger than {MOST_BYTES} bytes")
            data = await request.content.read(MOST_BYTES + 1)
            while data and len(data) <= MOST_BYTES and not request.content.at_eof():
                data += await request.content.read(MOST_BYTES + 1 - len(data))
            if len(data) > MOST_BYTES:
                return _refuse(413, f"the body is larger than {MOST_BYTES} bytes")
            try:
                body = json.loads(data)
            except (ValueError, RecursionError):
                body = None
            if not isinstance(body, dict):
                return _refuse(400, "the body is no JSON object")
            names["body"] = body
        try:
            answer = await asyncio.get_running_loop().run_in_executor(None, partial(work, **names))
        except FileNotFoundError as error:
            return _refuse(404, str(error))
        except ConflictError as error:
            return web.json_response(error.answer | {"error": str(error)}, status=409, headers=HEADERS)
        except BlockingIOError as error:
            return _refuse(503, str(error))
        except OSError as error:
            return _refuse(500, f"a file cannot be read or written: {error.strerror}")
        except (ValueError, TypeError) as error:
            return _refuse(400, str(error))
        if isinstance(answer, Path):
            return web.Response(
                body=await asyncio.get_running_loop().run_in_executor(None, answer.read_bytes),
                content_type=PICTURES[answer.suffix.lower()],
                headers=HEADERS | SEALED | (LASTING if lasting else {}),
            )
        return web.json_response({} if answer is None else answer, headers=HEADERS)

    return handle


def whole(name: str, value: str) -> int:
    """A number from 0 on that a request gave. ValueError for anything else."""
    if not (value.isascii() and value.isdigit() and len(value) < 16):
        raise ValueError(f"{name} must be a number from 0 on, got {value!r:.40}")
    return int(value)


def _own(request: web.Request) -> bool:
    """Whether a request comes from the page that this server gave out, or from no page at all."""
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:
        return site in ("same-origin", "none")
    origin = request.headers.get("Origin")
    return origin is None or urlsplit(origin).netloc.lower() == request.headers.get("Host", "").lower()


def _refuse(status: int, why: str) -> web.Response:
    return web.json_response({"error": why}, status=status, headers=HEADERS)
