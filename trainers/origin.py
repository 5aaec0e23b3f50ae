"""What a run was started on: its base, prompts and images, told apart so that a run never goes on with others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.atomic import write_json
from ..files.folder import Inside, inside
from ..files.strangers import read_json
from ..sampling.parts import Latent
from .dataset import Dataset
from .export import weights_hash

ORIGIN = "origin.json"
# Encoded again, on another day or device, a text or an image differs in its last bits: marks are compared within this
# share of the tensor's size. Two prompts, or two images, differ by ten times as much in one mark of four at least.
TOLERANCE = 0.02
MARKS, MOST = 4, 65_536
PAIRED = ("prompts", "latents", "losers", "strengths")
WORDS = {"negative": "negative prompt", "start_from": "LoRA to begin as", "prompts": "prompts or captions"}
MOST_BYTES = 2**28  # of the file: a few hundred bytes for each image


def origin(
    base_hash: str, dataset: Dataset, start: dict[str, Tensor] | None, reward: str | None = None
) -> dict[str, Any]:
    """As JSON values: the base's hash, the data set's marks, the hash of the LoRA to begin as, the reward's name."""
    return {"model": base_hash, **data_origin(dataset, start), "reward": reward}


def data_origin(dataset: Dataset, start: dict[str, Tensor] | None) -> dict[str, Any]:
    """The part of an origin that is known before the base is loaded."""
    marked: dict[int, list] = {}
    for tokens, _ in dataset.entries:
        if id(tokens) not in marked:
            marked[id(tokens)] = mark(tokens)
    return {
        "prompts": [marked[id(tokens)] for tokens, _ in dataset.entries],
        "negative": None if dataset.negative is None else mark(dataset.negative[0]),
        "latents": None if dataset.latents is None else [marks(latent) for latent in dataset.latents],
        "losers": None if dataset.losers is None else [marks(latent) for latent in dataset.losers],
        "strengths": dataset.strengths,
        "references": None if dataset.references is None else [mark(each) for each in dataset.references],
        "size": None if dataset.shape is None or dataset.latents is not None else list(dataset.shape),
        "start_from": None if start is None else weights_hash(start),
    }


def marks(latent: Latent) -> list:
    """The mark of a latent, or those of its parts."""
    return mark(latent) if isinstance(latent, Tensor) else [mark(part) for part in latent]


def mark(tensor: Tensor) -> list:
    """[shape, root mean square, four sums with random signs over the root of their number] of a tensor."""
    flat = tensor.detach().float().cpu().flatten()
    flat = flat[:: max(1, -(-flat.numel() // MOST))]
    sums = _signs(flat.numel()) @ flat / math.sqrt(max(1, flat.numel()))
    size = float(flat.square().mean().sqrt()) if flat.numel() else 0.0
    return [list(tensor.shape), round(size, 5), [round(float(s), 5) for s in sums]]


@lru_cache(maxsize=4)
def _signs(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 2, (MARKS, count), generator=generator).float() * 2 - 1


def alike(a: Any, b: Any) -> bool:
    """Whether two marks, lists of marks, or other values of an origin stand for the same."""
    if _is_mark(a) and _is_mark(b):
        near = TOLERANCE * max(a[1], b[1], 1e-5)
        return a[0] == b[0] and all(abs(x - y) <= near for x, y in zip(a[2], b[2], strict=True))
    if isinstance(a, Sequence) and isinstance(b, Sequence) and not isinstance(a, str):
        return len(a) == len(b) and all(alike(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def _is_mark(value: Any) -> bool:
    if not (isinstance(value, list) and len(value) == 3 and isinstance(value[0], list) and isinstance(value[2], list)):
        return False
    return len(value[2]) == MARKS and all(isinstance(number, float) for number in (value[1], *value[2]))


def recognise(folder: Path | Inside, now: Mapping[str, Any], going_on: bool) -> None:
    """Note what a run starts on; ValueError, naming the inputs, when one that goes on was started on something else."""
    path = inside(folder) / ORIGIN
    if going_on and path.is_file():
        refuse_other_origin(folder, now)
    else:
        write_json(path, now)


def refuse_other_origin(folder: Path | Inside, now: Mapping[str, Any]) -> None:
    """ValueError, naming the inputs, where a run was started on something else than this, which may be a part of it."""
    path = inside(folder) / ORIGIN
    if not path.is_file():
        return
    try:
        before = read_json(path, MOST_BYTES, finite=False)  # a pair may be infinitely certain
        if not isinstance(before, dict):
            raise ValueError(f"{path}: it is no object with names and values")
    except ValueError as error:
        raise ValueError(f"{error}: what the run was started with is not known, so give it another name") from error
    other = [name for name, value in now.items() if not alike(before.get(name), value)]
    if other:
        raise ValueError(
            f"name: the run {path.parent.name!r} was started with {_listed(other, before, now)}: give this run another "
            f"name, or set what it was started with to go on with it (in {folder})"
        )


def _listed(other: Sequence[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In words what differs, with its numbers where these do."""
    pairs = "losers" in other
    said = []
    for name in other:
        if pairs and name in PAIRED and name != "losers":
            continue  # they are a pair's
        many = name in PAIRED or name == "references"
        known = "pairs" if name == "losers" else WORDS.get(name, name)
        words = f"other {known}" if many else f"another {known}"
        counts = [len(each[name]) if isinstance(each.get(name), list) else 0 for each in (before, now)]
        said.append(f"{words} ({counts[0]}, now {counts[1]})" if many and counts[0] != counts[1] else words)
    return " and ".join(said)
