"""HTTP routes of ours on ComfyUI's server: a request of any page but its own is refused."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from aiohttp import web

ROOT = "/retort"
SETTING = "RETORT_HOSTS"
MOST_BYTES = 1 << 16
MOST_ANSWER = 1_000_000  # bytes of JSON
MOST_PICTURE = 1 << 26
MOST_WAITING = 64  # requests that work is done for at once
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

_log = logging.getLogger("retort.routes")
# Of our own: whatever our files cost, ComfyUI's files are served by other threads.
_workers = ThreadPoolExecutor(4, thread_name_prefix="retort route")
_places = threading.BoundedSemaphore(MOST_WAITING)
_listening: set[str] = set()


class ConflictError(Exception):
    """What was asked for cannot be any more; `answer` says how things stand."""

    def __init__(self, why: str, answer: dict[str, Any]):
        super().__init__(why)
        self.answer = answer


def listen_at(names: Iterable[str]) -> None:
    """Tell which names the server was started to listen at: a page may call it by them."""
    _listening.update(name.strip().lower() for name in names if name.strip())


def guarded(work: Callable[..., Answer], lasting: bool = False) -> Callable[[web.Request], Any]:
    """A handler that runs `work(**names in the path, **query, body=...)` in a thread of ours.

    What comes back is sent as JSON of at most a megabyte, in which a number that is not finite is null, or, a Path, as
    a picture of at most 64 MB; lasting: what is at an address never changes. body: of a POST, a JSON object of at most
    64 kB. ValueError and TypeError become 400, FileNotFoundError 404, ConflictError 409 with its answer,
    BlockingIOError 503, as when very many wait, and another error 500, each with `error` saying why; what another page
    asks for is refused with 403.
    """

    async def handle(request: web.Request) -> web.Response:
        if wrong := stranger(*(request.headers.getall(name, []) for name in ("Host", "Origin", "Sec-Fetch-Site"))):
            return _refuse(403, wrong)
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
        if not _places.acquire(blocking=False):
            return _refuse(503, "too many requests wait already: ask again in a moment")
        done = _workers.submit(_answered, partial(work, **names))
        # Whoever went away meanwhile is still worked for.
        done.add_done_callback(lambda _: _places.release())
        status, content, kind = await asyncio.wrap_future(done)
        headers = HEADERS if kind == "application/json" else HEADERS | SEALED | (LASTING if lasting else {})
        return web.Response(status=status, body=content, content_type=kind, headers=headers)

    return handle


def handed_out(work: Callable[..., BinaryIO], kind: str) -> Callable[[web.Request], Any]:
    """A handler that sends the file which `work(**names in the path)` opens, of any length, to be kept by the browser.

    Whom it refuses, and what errors become, is as for `guarded`.
    """

    async def handle(request: web.Request) -> web.StreamResponse:
        if wrong := stranger(*(request.headers.getall(name, []) for name in ("Host", "Origin", "Sec-Fetch-Site"))):
            return _refuse(403, wrong)
        if not _places.acquire(blocking=False):
            return _refuse(503, "too many requests wait already: ask again in a moment")
        loop = asyncio.get_running_loop()
        try:
            try:
                file = await loop.run_in_executor(_workers, partial(work, **request.match_info))
            except FileNotFoundError as error:
                return _refuse(404, str(error))
            except BlockingIOError as error:
                return _refuse(503, str(error))
            except (ValueError, OSError) as error:
                return _refuse(400, str(error))
            with file:
                response = web.StreamResponse(headers=HEADERS | SEALED | {"Content-Disposition": "attachment"})
                response.content_type = kind
                await response.prepare(request)
                while data := await loop.run_in_executor(_workers, file.read, 1 << 20):
                    await response.write(data)
                await response.write_eof()
                return response
        finally:
            _places.release()

    return handle


def whole(name: str, value: str) -> int:
    """A number from 0 on that a request gave. ValueError for anything else."""
    if not (value.isascii() and value.isdigit() and len(value) < 16):
        raise ValueError(f"{name} must be a number from 0 on, got {value!r:.40}")
    return int(value)


def stranger(hosts: list[str], origins: list[str], sites: list[str]) -> str:
    """Why a request with these headers comes from another page than the one that this server gave out, "" if it may.

    A page of a stranger's may have a name that leads to this machine: its requests then look like our own, but for the
    name. So the server must be called by an address, by localhost, or by a name that it was told of.
    """
    if len(hosts) != 1 or len(origins) > 1 or len(sites) > 1:
        return "give one Host, and no header twice"
    name = _name(hosts[0])
    if name is None or not (_is_address(name) or name in {"localhost", *_listening, *_named()}):
        return (
            f"this server does not answer to the name {(name or hosts[0])[:80]!r}: use its address, or start ComfyUI "
            f"with the environment variable {SETTING} set to the name"
        )
    if (sites and sites[0] not in ("same-origin", "none")) or (origins and not _same(origins[0], hosts[0])):
        return "only ComfyUI's own page may ask for this"
    return ""


def _same(origin: str, host: str) -> bool:
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()


def _name(host: str) -> str | None:
    """The name or address in a Host header, without its port; None for what is no such header."""
    try:
        parts = urlsplit(f"//{host}")
        parts.port  # noqa: B018 (raises for a port that is none)
    except ValueError:
        return None
    plain = not set("/?#@\\ \t") & set(host)
    return parts.hostname if plain else None


def _named() -> set[str]:
    return {name.strip().lower() for name in os.environ.get(SETTING, "").split(",") if name.strip()}


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _answered(work: Callable[[], Answer]) -> tuple[int, bytes, str]:
    """(status, content, its type) of what is asked for, in the thread that did the work."""
    try:
        answer = work()
        if isinstance(answer, Path):
            return 200, _picture(answer), PICTURES[answer.suffix.lower()]
        content = spelled({} if answer is None else answer)
        if len(content) > MOST_ANSWER:
            raise OverflowError(f"the answer would have {len(content)} bytes, more than {MOST_ANSWER}")
        return 200, content, "application/json"
    except FileNotFoundError as error:
        return _told(404, str(error))
    except ConflictError as error:
        return 409, spelled(error.answer | {"error": str(error)}), "application/json"
    except BlockingIOError as error:
        return _told(503, str(error))
    except OSError as error:
        return _told(500, f"a file cannot be read or written: {error.strerror}")
    except (ValueError, TypeError) as error:
        return _told(400, str(error))
    except Exception as error:  # the page is told, whatever it is, and ComfyUI's log has the rest
        _log.exception("a request could not be answered")
        return _told(500, f"{type(error).__name__}: {error}")


def _picture(path: Path) -> bytes:
    with open(path, "rb") as handle:
        data = handle.read(MOST_PICTURE + 1)
    if len(data) > MOST_PICTURE:
        raise ValueError(f"{path.name} is larger than {MOST_PICTURE} bytes, so it is not shown")
    return data


def spelled(value: Any) -> bytes:
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False)
    # Half a surrogate pair is no text that could be sent.
    return text.encode("utf-8", "replace")


def _finite(value: Any) -> Any:
    """JSON's values with null for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _told(status: int, why: str) -> tuple[int, bytes, str]:
    return status, spelled({"error": why[:2000]}), "application/json"


def _refuse(status: int, why: str) -> web.Response:
    return web.Response(status=status, body=_told(status, why)[1], content_type="application/json", headers=HEADERS)
