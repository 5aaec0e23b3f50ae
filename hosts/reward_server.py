"""A reward in a process of its own, for models that need other packages than ComfyUI's: started by its file path.

    python PATH/TO/retort/hosts/reward_server.py my_scorer.py [--port 8399]

in an environment with that model's packages and Pillow. `my_scorer.py` is yours and defines
`score(images, prompts) -> list of numbers` (PIL images in RGB, one prompt each), and, if it likes, `NAME` and
`RANGE = (lowest, highest)`. It listens on this machine alone and answers no web page. `hosts.rewards.remote` is the
other end:

* GET / -> {"name": ..., "range": [low or null, high or null]}
* POST / {"images": [PNG as base64], "prompts": [...]} -> {"scores": [...]} or, with status 500, {"error": ...}
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import io
import json
import logging
import math
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

PORT = 8399
MOST = 512 * 2**20  # bytes of one request
CLIENTS = 8  # that are served at once
SENDING = 60.0  # seconds in which a request must have come whole
NAMES = ("127.0.0.1", "localhost", "[::1]")
_log = logging.getLogger("retort.reward_server")


def scorer(path: Path) -> ModuleType:
    """The user's file, run. ValueError when it defines no `score`."""
    spec = importlib.util.spec_from_file_location("retort_scorer", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"{path} is not a Python file: give the file that defines score(images, prompts)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(vars(module).get("score")):
        raise ValueError(f"{path} defines no score(images, prompts)")
    return module


def server(module: ModuleType, port: int) -> HTTPServer:
    """Listens on 127.0.0.1; port 0 takes a free one. Several may ask at once, and are scored one after another."""
    low, high = vars(module).get("RANGE", (-math.inf, math.inf))
    about = {
        "name": str(vars(module).get("NAME", Path(str(module.__file__)).stem)),
        "range": [v if math.isfinite(v) else None for v in (float(low), float(high))],
    }
    # There is one model.
    alone, places = threading.Lock(), threading.BoundedSemaphore(CLIENTS)

    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0  # seconds for which a client may be silent

        def handle(self) -> None:
            if not places.acquire(blocking=False):
                self.wfile.write(b"HTTP/1.0 503 Busy\r\nContent-Length: 0\r\n\r\n")
                return
            try:
                super().handle()
            finally:
                places.release()

        def do_GET(self) -> None:
            if self.welcome():
                self.answer(200, about)

        def do_POST(self) -> None:
            if not self.welcome():
                return
            told = self.headers.get("Content-Length", "")
            length = int(told) if told.isascii() and told.isdigit() and len(told) < 16 else 0
            if self.headers.get("Content-Type") != "application/json" or not 0 < length <= MOST:
                self.answer(400, {"error": f"send JSON of at most {MOST} bytes, and its Content-Length"})
                return
            data = self.body(length)
            if data is None:
                self.answer(408, {"error": f"the request was not whole within {SENDING:g} seconds"})
                return
            try:
                with alone:
                    found = [float(v) for v in self.score(json.loads(data))]
            except Exception as error:  # whatever the user's model raises is told, and the next request is served
                _log.exception("scoring failed")
                self.answer(500, {"error": f"{type(error).__name__}: {error}"})
                return
            # NaN is not JSON: the other end names the image.
            self.answer(200, {"scores": [v if math.isfinite(v) else None for v in found]})

        def welcome(self) -> bool:
            """Whether a program of this machine asks: a web page says that it is one, or calls us by another name."""
            hosts = self.headers.get_all("Host", [])
            name = hosts[0].rpartition(":")[0] if len(hosts) == 1 else ""
            page = "Origin" in self.headers or "Sec-Fetch-Site" in self.headers
            if name.lower() not in NAMES or page:
                self.answer(403, {"error": "only programs on this machine may ask"})
                return False
            return True

        def body(self, length: int) -> bytes | None:
            """What was sent, None where it did not come in time."""
            parts, end = [], time.monotonic() + SENDING
            while length:
                try:
                    part = self.rfile.read1(min(length, 2**20))
                except OSError:
                    return None
                if not part or time.monotonic() > end:
                    return None
                parts.append(part)
                length -= len(part)
            return b"".join(parts)

        def score(self, request: dict[str, Any]) -> list[Any]:
            from PIL import Image

            pictures = []
            for text in request["images"]:
                with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as picture:
                    pictures.append(picture.convert("RGB"))
            return list(module.score(pictures, [str(p) for p in request["prompts"]]))

        def answer(self, status: int, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            _log.debug(format, *args)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            _log.debug("a client went away", exc_info=True)

    return Server(("127.0.0.1", port), Handler)


def main(arguments: list[str] | None = None) -> None:
    """Serve until it is stopped."""
    parser = argparse.ArgumentParser(description="Serve a reward to Retort from an environment of its own.")
    parser.add_argument("scorer", type=Path, help="your file that defines score(images, prompts)")
    parser.add_argument("--port", type=int, default=PORT)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    made = server(scorer(given.scorer), given.port)
    _log.info("serving %s at http://127.0.0.1:%d", given.scorer, made.server_port)
    try:
        made.serve_forever()
    except KeyboardInterrupt:
        made.server_close()


if __name__ == "__main__":
    main()
