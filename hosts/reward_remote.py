"""A reward that another process on this machine gives, over HTTP; `hosts.reward_server` says what is spoken.

Only this machine is asked, since a workflow from elsewhere names the address; no proxy and no redirect is followed.
"""

from __future__ import annotations

import base64
import io
import json
import math
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ..rewards.preprocess import to_bytes
from ..rewards.scoring import checked, each

HERE = ("127.0.0.1", "localhost", "::1")
MOST = 2**20  # bytes of an answer
ASKING, SCORING = 10.0, 600.0  # seconds


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


class RemoteReward:
    """See `rewards.contract.Reward`. url: http://127.0.0.1:PORT of a `hosts.reward_server`."""

    differentiable = False

    def __init__(self, url: str):
        try:
            parts = urlsplit(url)
            fits = parts.scheme == "http" and parts.hostname in HERE and parts.port is not None and not parts.username
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"url {url!r} is not a server on this machine: give http://127.0.0.1:PORT")
        self.url = url
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
        about = self._ask(None, ASKING)
        ends = about.get("range")
        if not isinstance(about.get("name"), str) or not isinstance(ends, list) or len(ends) != 2:
            raise ValueError(f"url {url!r} answers, but not as a reward server of Retort: {str(about)[:80]}")
        self.name = about["name"][:100]
        low, high = (sign * math.inf if v is None else float(v) for v, sign in zip(ends, (-1, 1), strict=True))
        self.range = (low, high)

    def __call__(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """(B,) fp32."""
        words = each(prompts, len(checked(images)))
        sent = {"images": [_png(picture) for picture in to_bytes(images)], "prompts": words}
        scores = self._ask(sent, SCORING).get("scores")
        if not isinstance(scores, list) or len(scores) != len(words):
            raise ValueError(f"the reward server at {self.url} gave {str(scores)[:80]} for {len(words)} images")
        numbers = [float(v) if isinstance(v, int | float) else math.nan for v in scores]
        return torch.tensor(numbers, dtype=torch.float32, device=images.device)

    def _ask(self, content: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(self.url, data, {"Content-Type": "application/json"})
        try:
            with self._opener.open(request, timeout=seconds) as answer:
                found = json.loads(answer.read(MOST))
        except urllib.error.HTTPError as error:
            told = error.read(2000).decode(errors="replace")
            raise ValueError(f"the reward server at {self.url} failed ({error.code}): {told}") from error
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the reward server at {self.url} does not answer ({error}): start it with "
                "`python hosts/reward_server.py your_scorer.py`, as the help page of Reward says"
            ) from error
        if not isinstance(found, dict):
            raise ValueError(f"the reward server at {self.url} gave {str(found)[:80]}, which is no answer")
        return found


def _png(picture: Tensor) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    # What saves time here: the other process is next door.
    Image.fromarray(picture.numpy()).save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()
