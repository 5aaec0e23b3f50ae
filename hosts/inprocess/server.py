"""The server object that ComfyUI's executor and some nodes talk to, without a network: what it sends is heard here.

It is ComfyUI's own class, so packs that add routes or handlers when they are imported find everything that they use.
"""

from __future__ import annotations

import asyncio
import io
import re
import struct
from pathlib import Path
from typing import Any

from comfy.cli_args import args
from PIL import Image
from protocol import BinaryEventTypes
from server import PromptServer

from ...files.atomic import write_atomically
from ..headless import progress

CLIENT = "retort"
NOTICE = "retort.notice"  # what our nodes say to the page before a prompt runs


class Offline(PromptServer):
    """A PromptServer that listens nowhere. Progress goes to the watcher of the run.

    lines: what is said below nodes, the last of each, by node; and what is said before anything runs.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, folder: Path):
        # No page is served, so none needs to be installed.
        args.front_end_root = str(folder)
        super().__init__(loop)
        self.begin({})

    def begin(self, titles: dict[str, str], previews: Path | None = None) -> None:
        """A prompt begins, whose nodes have these titles. previews: a folder for what they show while they work."""
        self._titles, self._begun, self._previews, self._at = titles, list[str](), previews, ""
        self.lines: dict[str, str] = {}

    def send_sync(self, event: Any, data: Any, sid: str | None = None) -> None:
        """What ComfyUI tells its page, called from whatever thread a node works in."""
        if event == "executing" and data["node"] is not None:
            # Nodes that a node unfolds into bear its id behind theirs.
            node = self._at = str(data["display_node"])
            if node in self._titles:
                if node not in self._begun:
                    self._begun.append(node)
                progress.node(len(self._begun) - 1, len(self._titles), self._titles[node])
        elif event == "progress":
            progress.step(int(data["value"]), int(data["max"]))
        elif event == BinaryEventTypes.UNENCODED_PREVIEW_IMAGE and self._previews is not None:
            _, picture, size = data
            show(picture, size, self._previews / preview_name(self._at))
        elif event == BinaryEventTypes.TEXT:
            # Each takes the place of the node's last, as on the page.
            end = 4 + struct.unpack(">I", data[:4])[0]
            self.lines[data[4:end].decode()] = data[end:].decode("utf-8", "replace")
        elif event == NOTICE:
            self.lines[data["text"]] = data["text"]


def preview_name(node: str) -> str:
    """The file of what a node shows while it works: node_12.jpg, of a node within a subgraph node_75_3.jpg."""
    return f"node_{re.sub('[^A-Za-z0-9_-]', '_', node)[:80]}.jpg"


def show(picture: Image.Image, size: int | None, path: Path) -> None:
    """Put a picture, made smaller to `size` pixels, in the place of the last one: a reader finds the old or the new."""
    picture = picture.convert("RGB")
    if size is not None:
        picture.thumbnail((size, size))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=90)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data.getvalue())
