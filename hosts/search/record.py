"""What a search has found so far, as files that a page can look at while it goes on: curve, tree, pictures, latents.

A record is a folder: `view.json`, and `item_I/N.jpg` and `item_I/N.latent` (as core's Save Latent writes) of the
candidates N whose rewards were among the best when they were found. Nothing reads a record to go on with a search; Save
Search is for that. So nothing here is synced to the disk, and an error of the disk ends the record, not the search.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...files.atomic import tensors
from ...files.entries import LinkError
from ...files.folder import Inside, inside
from ...files.pictures import rounded
from ...files.strangers import read_json
from ...sampling.search import State
from ...sampling.tree import Tree

VIEW = "view.json"
KEPT, RECORDS = 64, 12
SIDE = 512  # pixels of a picture
WRITE_EVERY = 1.0
MOST_VIEW = 1 << 25  # bytes of a record
# Nodes of a tree that a page is told of: the first ones, which the others hang on.
MOST_NODES = 4000
_log = logging.getLogger("retort.search")


class Record:
    """The record of one search of `items` latents, to be entered around it; without a folder it keeps nothing.

    asked: what the search was asked for, as `asked` spells it. most: the highest reward that there can be.
    """

    def __init__(
        self, records: Path | None, prompt: str, reward: str, items: int, asked: str = "", most: float = math.inf
    ):
        self.folder: Inside | None = None
        self._view: dict[str, Any] = {
            "prompt": prompt, "reward": reward, "begun": time.time(), "pid": os.getpid(), "going": True,
            "items": [None] * items, "asked": asked, "cancelled": False, "most": most if math.isfinite(most) else None,
        }  # fmt: skip
        self._fresh: tuple[Tensor, Sequence[Tensor], list[float]] | None = None
        self._kept: list[dict[int, float]] = [{} for _ in range(items)]
        self._states: list[State | None] = [None] * items
        self._written = 0.0
        if records is None:
            return
        try:
            there = inside(records).folders()
            for old in there[: max(0, len(there) - RECORDS + 1)]:
                (inside(records) / old).remove_tree()
            self.folder = inside(records) / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
            for item in range(items):
                (self.folder / f"item_{item}").make()
        except (OSError, LinkError) as error:
            self._lose(error)

    def scored(self, images: Tensor, samples: Sequence[Tensor], rewards: Tensor) -> None:
        """Pictures (B, H, W, 3), or (B, T, H, W, 3) of videos, the parts of their LATENT samples, rewards (B,)."""
        if self.folder is not None:
            self._fresh = images, samples, rewards.tolist()

    def tell(self, state: State, item: int) -> None:
        """How the search stands; called after every forward and every scored batch."""
        if self.folder is None:
            return
        fresh, self._fresh = self._fresh, None
        self._states[item] = state
        try:
            if fresh is not None and state.best.offered:
                self._keep(self.folder / f"item_{item}", self._kept[item], state.best.offered, *fresh)
            if time.monotonic() - self._written > WRITE_EVERY:
                self._view["items"][item] = seen(state, self._kept[item])
                self._write(self.folder)
        except (OSError, LinkError) as error:
            self._lose(error)

    def cancel(self) -> None:
        """The search was cancelled: it has given what it had."""
        self._view["cancelled"] = True

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_: object) -> None:
        """The search is over, however it ended."""
        if self.folder is None:
            return
        self._view["going"] = False
        for item, state in enumerate(self._states):
            if state is not None:
                self._view["items"][item] = seen(state, self._kept[item])
        try:
            self._write(self.folder)
        except (OSError, LinkError) as error:
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        self.folder = None
        _log.warning("the panel will not show this search: %s", error)

    def _write(self, folder: Inside) -> None:
        (folder / VIEW).write(json.dumps(self._view).encode(), synced=False)
        self._written = time.monotonic()

    def _keep(
        self, folder: Inside, kept: dict[int, float], numbers: Sequence[int], images: Tensor, samples: Sequence[Tensor],
        rewards: Sequence[float],
    ) -> None:  # fmt: skip
        for number, image, sample, reward in zip(numbers, images, zip(*samples, strict=True), rewards, strict=True):
            if len(kept) >= KEPT:
                worst = min(kept, key=kept.__getitem__)
                if kept[worst] >= reward:
                    continue
                del kept[worst]
                for ending in ("jpg", "latent"):
                    (folder / f"{worst}.{ending}").remove()
            kept[number] = reward
            (folder / f"{number}.jpg").write(_small(image), synced=False)
            # Core reads the first alone; what sounds beside a video stands in the file all the same.
            names = ("latent_tensor", *(f"latent_tensor_{i}" for i in range(1, len(sample))))
            single = (part.detach().float().unsqueeze(0) for part in sample)
            latent = {**dict(zip(names, single, strict=True)), "latent_format_version_0": torch.tensor([])}
            (folder / f"{number}.latent").write(tensors(latent), synced=False)


def asked(seed: Any, keep: Any, calls: Any, seconds: Any) -> str:
    """What tells searches apart before they run, for `cancelled`."""
    return f"{seed} {keep} {calls or 0} {float(seconds or 0):g}"


def cancelled(records: Path | None, wanted: str) -> int:
    """How many of the searches that there are records of were asked for this, and cancelled."""
    if records is None:
        return 0
    count = 0
    for name in inside(records).folders():
        try:
            view = read_json(inside(records) / name / VIEW, MOST_VIEW, finite=False)
        except ValueError:
            continue  # one that is damaged, or is just being taken away
        count += isinstance(view, dict) and view.get("cancelled") is True and view.get("asked") == wanted
    return count


def seen(state: State, kept: dict[int, float]) -> dict[str, Any]:
    """A search's item as a page sees it, in JSON's types.

    history: [calls, reward] at each new best. kept: [number, reward] of candidates that have a picture, best first.
    tree: lists of one entry a node, in the order of their making, the root first (`sampling.tree.Tree`); None for other
    methods.
    """
    found = state.best.found
    view: dict[str, Any] = {
        "method": state.method,
        "calls": state.ledger.calls,
        "rewards": state.ledger.rewards,
        "seconds": round(state.ledger.seconds, 1),
        "history": [list(pair) for pair in state.best.history],
        "best": [[c.number, c.reward] for c in found if c.finished],
        "kept": sorted(map(list, kept.items()), key=lambda pair: -pair[1]),
        "tree": None,
    }
    if isinstance(state, Tree):
        view["tree"] = {
            "size": state.size,
            "stops": len(state.stops),
            "sigmas": [state.setting["sigmas"][step] for step in state.stops],
            "parent": state.parent[:MOST_NODES].tolist(),
            "place": state.place[:MOST_NODES].tolist(),
            "value": [round(v, 6) for v in state.value[:MOST_NODES].tolist()],
            "number": state.number[:MOST_NODES].tolist(),
        }
    return view


def _small(image: Tensor) -> bytes:
    from PIL import Image

    still = image if image.ndim == 3 else image[0]
    step = max(1, min(still.shape[:2]) // (2 * SIDE))
    pixels = rounded(still[::step, ::step]).numpy()
    picture = Image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85)
    return data.getvalue()
