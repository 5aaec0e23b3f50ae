"""What a page sees of searches, and the latents that it may take from one.

All names come from whoever sent the request. `records` is the host's `search_records()`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...files.folder import Inside, inside
from ...files.strangers import read_json
from .record import MOST_VIEW, VIEW

NAME = re.compile(r"\d{8}-\d{6}-[0-9a-f]{8}")
MOST_FILES, MOST_RECORDS = 200, 50
# What a page is told of all items of a search together.
MOST_ITEMS, MOST_PAIRS, MOST_NODES, MOST_TEXT = 64, 3000, 16_000, 4000
TREE = ("parent", "place", "value", "number")


def searches(records: Path, saved: Path, pid: int) -> dict[str, Any]:
    """The searches that this process has records of, latest first, without their trees; and the saved ones by name.

    pid: of this process; a record of another one that says it goes on was left by a crash. A record that cannot be read
    is left out.
    """
    found: list[dict[str, Any]] = []
    names = [name for name in inside(records).folders() if NAME.fullmatch(name)]
    for name in names[: -MOST_RECORDS - 1 : -1]:
        try:
            view = record(records, name, pid)
        except (ValueError, OSError):
            continue
        for item in filter(None, view["items"]):
            del item["tree"], item["kept"]
            item["history"], item["best"] = item["history"][-1:], item["best"][:1]
        found.append({**view, "prompt": view["prompt"][:MOST_TEXT]})
    files = [name for name in inside(saved).files() if name.endswith(".safetensors")]
    files.sort(key=lambda name: -(inside(saved) / name).changed())
    return {"searches": found, "saved": [name.removesuffix(".safetensors") for name in files[:MOST_FILES]]}


def record(records: Path, name: str, pid: int) -> dict[str, Any]:
    """A search whole, its name with it.

    ValueError for a name that is none or a record that cannot be read, FileNotFoundError where it is not there.
    """
    path = _folder(records, name) / VIEW
    if not path.is_file():
        raise FileNotFoundError(f"the search {name} has found nothing yet")
    try:
        view = _view(read_json(path, MOST_VIEW, finite=False))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"the record of the search {name} cannot be read ({type(error).__name__}): delete it"
        ) from error
    view["going"] &= view.pop("pid") == pid
    return {"name": name, **view}


def _view(told: Any) -> dict[str, Any]:
    """A record in the types that `search_record` writes, no longer than a page can use. Any error for another one."""
    items = told["items"][:MOST_ITEMS]
    view: dict[str, Any] = {name: str(told[name])[:MOST_TEXT] for name in ("prompt", "reward")}
    view |= {"begun": _number(told.get("begun", 0)), "pid": int(told["pid"]), "going": told["going"] is True}
    view["cancelled"] = told.get("cancelled") is True
    view["most"] = None if told.get("most") is None else _number(told["most"])
    return view | {"items": [None if item is None else _item(item, len(items)) for item in items]}


def _item(told: Any, items: int) -> dict[str, Any]:
    view: dict[str, Any] = {"method": str(told["method"])[:MOST_TEXT], "tree": None}
    for name in ("calls", "rewards", "seconds"):
        view[name] = _number(told[name])
    for name in ("history", "best", "kept"):
        view[name] = [[_number(a), _number(b)] for a, b in told[name][: max(16, MOST_PAIRS // items)]]
    if (tree := told["tree"]) is not None:
        lists = {name: [_number(v) for v in tree[name][: max(16, MOST_NODES // items)]] for name in TREE}
        parents = lists["parent"]
        if len({len(values) for values in lists.values()}) > 1 or not all(
            isinstance(parent, int) and parent < node for node, parent in enumerate(parents)
        ):
            raise ValueError("a node hangs on a later one")
        sigmas = [_number(sigma) for sigma in tree["sigmas"][:MOST_FILES]]
        view["tree"] = {"size": int(tree["size"]), "stops": int(tree["stops"]), "sigmas": sigmas, **lists}
    return view


def _number(value: Any) -> float | int:
    """A number of a record; one that is not finite is 0. Any error for what is no number."""
    if isinstance(value, str | bool):
        raise TypeError("it is no number")
    return value if abs(value) < 2**53 else 0


def picture(records: Path, name: str, item: int, number: int) -> Path:
    """A candidate's picture; errors as of `record`."""
    return _candidate(records, name, item, number, "jpg").path


def take(records: Path, inputs: Path, name: str, item: int, number: int) -> str:
    """Put a candidate's latent where Load Latent finds it, and return the file's name there; errors as of `record`."""
    source = _candidate(records, name, item, number, "latent")
    file = f"retort_{name}_{item}_{number}.latent"
    (inside(inputs) / file).write(source.read())
    return file


def _folder(records: Path, name: str) -> Inside:
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r:.80} is no search's name")
    return inside(records) / name


def _candidate(records: Path, name: str, item: int, number: int, ending: str) -> Inside:
    path = _folder(records, name) / f"item_{item}" / f"{number}.{ending}"
    if not path.is_file():
        raise FileNotFoundError(f"the search {name} has not kept candidate {number}: only the best are")
    return path
