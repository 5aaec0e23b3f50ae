"""Lets nodes see the prompt that ComfyUI checks, and puts what they refuse on the input that it is about.

ComfyUI hands a node's own check the values of those inputs alone that it then no longer checks itself, and puts a
refusal on every one of them. So our check is told of no input: it reads the prompt, and raises. ComfyUI puts what is
raised on the node; the answer to the page, where it names the input, is changed here on its way out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web
from comfy_execution.utils import get_executing_context

from ..prompted import PROMPT, inputs_of
from . import students

PATHS = ("/prompt", "/api/prompt")
REFUSED = ".nodes.checks.RefusedInput"
# How the page calls an error of one input that it shows in full at once.
SHOWN = "exception_during_inner_validation"
NOTICE = "retort.notice"  # what the page shows as a warning
_log = logging.getLogger("retort")


def prompted() -> dict[str, Any] | None:
    """See the contract."""
    context = get_executing_context()
    return None if context is None else inputs_of(context.node_id)


def listen(server: Any, presets: Callable[[], Sequence[Path]]) -> None:
    """Hear of every prompt that a server is asked to run; server: its `PromptServer`. presets: the folders of the
    user's presets of students."""

    def warn(request: dict[str, Any]) -> dict[str, Any]:
        prompt = request.get("prompt")
        for text in students.warnings(prompt, presets()) if isinstance(prompt, dict) else ():
            _log.warning("%s", text)
            server.send_sync(NOTICE, {"text": text}, request.get("client_id"))
        return request

    server.add_on_prompt_handler(_heard)
    server.add_on_prompt_handler(warn)
    # A server that runs already takes no more.
    if not server.app.middlewares.frozen:
        server.app.middlewares.append(_marked)


def _heard(request: dict[str, Any]) -> dict[str, Any]:
    prompt = request.get("prompt")
    PROMPT.set(prompt if isinstance(prompt, dict) else None)
    return request


@web.middleware
async def _marked(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    if request.method != "POST" or request.path not in PATHS:
        return await handler(request)
    token = PROMPT.set(None)
    try:
        response = await handler(request)
    finally:
        PROMPT.reset(token)
    if isinstance(response, web.Response) and response.content_type == "application/json" and response.text:
        answer = json.loads(response.text)
        if mark(answer):
            response.text = json.dumps(answer)
    return response


def mark(answer: Any) -> bool:
    """Put refusals of ours on their inputs, in ComfyUI's answer to a prompt; whether there were any."""
    nodes = answer.get("node_errors") if isinstance(answer, Mapping) else None
    ours = [
        error
        for node in (nodes.values() if isinstance(nodes, Mapping) else ())
        for error in node["errors"]
        if str(error.get("extra_info", {}).get("exception_type", "")).endswith(REFUSED)
    ]
    for error in ours:
        name, _, sentence = error["details"].partition(": ")
        error.update(type=SHOWN, details=sentence, extra_info={"input_name": name})
    return bool(ours)
