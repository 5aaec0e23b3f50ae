"""A reward that another process on this machine gives, over HTTP; `hosts.reward_server` says what is spoken.

Only this machine is asked, since a workflow from elsewhere names the address, and only at the address of the server
itself; no proxy and no redirect is followed. An answer has a time by which it must be whole, and cancelling ends it.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ...rewards.preprocess import to_bytes
from ...rewards.scoring import checked, each

HERE = ("127.0.0.1", "localhost", "::1")
MOST = 2**20  # bytes of an answer
ASKING, SCORING = 10.0, 600.0  # seconds until an answer is whole
LOOK_EVERY = 0.1


class RemoteReward:
    """See `rewards.contract.Reward`. url: http://127.0.0.1:PORT of a `hosts.reward_server`.

    check: called while an answer is awaited; whatever it raises ends the waiting.
    """

    differentiable = False

    def __init__(self, url: str, check: Callable[[], None] = lambda: None):
        try:
            parts = urlsplit(url)
            fits = parts.scheme == "http" and parts.hostname in HERE and parts.port is not None
            fits = fits and not (parts.username or parts.password or parts.query or parts.fragment)
            fits = fits and parts.path in ("", "/") and not set("?#") & set(url)
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"url {url!r:.200} is not a server on this machine: give http://127.0.0.1:PORT")
        self.url, self._check = url, check
        self._place = parts.hostname or "", parts.port or 0
        about = self._ask(None, ASKING)
        ends = about.get("range")
        if not isinstance(about.get("name"), str) or not isinstance(ends, list) or len(ends) != 2:
            raise ValueError(f"url {url!r} answers, but not as a reward server of Retort: {str(about)[:80]}")
        self.name = about["name"][:100]
        low, high = (sign * math.inf if v is None else _number(v) for v, sign in zip(ends, (-1, 1), strict=True))
        if not low < high:
            raise ValueError(f"the reward server at {url} gives the range {str(ends)[:80]}, which is none")
        self.range = (low, high)

    def __call__(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """(B,) fp32."""
        words = each(prompts, len(checked(images)))
        sent = {"images": [_png(picture) for picture in to_bytes(images)], "prompts": words}
        scores = self._ask(sent, SCORING).get("scores")
        if not isinstance(scores, list) or len(scores) != len(words):
            raise ValueError(f"the reward server at {self.url} gave {str(scores)[:80]} for {len(words)} images")
        return torch.tensor([_number(v) for v in scores], dtype=torch.float32, device=images.device)

    def _ask(self, content: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
        data = None if content is None else json.dumps(content).encode()
        call = _Call(*self._place, data)
        end = time.monotonic() + seconds
        try:
            while call.thread.is_alive():
                call.thread.join(LOOK_EVERY)
                self._check()
                if time.monotonic() > end:
                    raise TimeoutError(f"no whole answer within {seconds:g} seconds")
            status, told = call.result()
            found = json.loads(told) if status == 200 else None
        except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
            raise ValueError(
                f"the reward server at {self.url} does not answer ({error}): start it with "
                "`python hosts/reward_server.py your_scorer.py`, as the help page of Reward says"
            ) from error
        finally:
            call.hang_up()
        if status != 200:
            said = told[:2000].decode(errors="replace")
            raise ValueError(f"the reward server at {self.url} failed ({status}): {said}")
        if not isinstance(found, dict):
            raise ValueError(f"the reward server at {self.url} gave {str(found)[:80]}, which is no answer")
        return found


class _Call:
    """A request that is made and answered in a thread, which ends when it is hung up."""

    def __init__(self, host: str, port: int, data: bytes | None):
        self._connection = http.client.HTTPConnection(host, port, timeout=SCORING)
        self._data = data
        self._found: tuple[int, bytes] | BaseException = OSError("it hung up")
        self._line: socket.socket | None = None
        self.thread = threading.Thread(target=self._talk, name="retort remote reward", daemon=True)
        self.thread.start()

    def _talk(self) -> None:
        try:
            self._connection.connect()
            self._line = self._connection.sock
            method = "GET" if self._data is None else "POST"
            self._connection.request(method, "/", self._data, {"Content-Type": "application/json"})
            answer = self._connection.getresponse()
            told = answer.read(MOST + 1)
            if len(told) > MOST:
                raise ValueError(f"its answer is larger than {MOST} bytes")
            self._found = answer.status, told
        except (OSError, ValueError, http.client.HTTPException) as error:
            self._found = error

    def result(self) -> tuple[int, bytes]:
        """(status, content), once the thread has ended; raises what it met."""
        if isinstance(self._found, BaseException):
            raise self._found
        return self._found

    def hang_up(self) -> None:
        """End the thread, wherever it waits."""
        if self._line is not None:
            with contextlib.suppress(OSError):
                self._line.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def _number(value: Any) -> float:
    """A number of an answer, NaN for anything else."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


def _png(picture: Tensor) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    # What saves time here: the other process is on this machine.
    Image.fromarray(picture.numpy()).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()
