"""A search in a file: what is searched and what it knows of each item, so that another session can go on with it.

One safetensors file: tensors `sigmas`, `latent.*` (`latent.*/I` of a latent of several parts) and `item.N.*`, and
everything else as JSON in its header. A file may be a stranger's: names, types and ranges are checked.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...files.atomic import checked_name, refuse_types, tensors, write_new
from ...files.folder import Inside, inside
from ...files.strangers import parse
from ...sampling.find import Find, FindConfig
from ...sampling.particles import BestOf, BestOfConfig, Steering, SteeringConfig, ValueConfig, Values
from ...sampling.parts import parts_of
from ...sampling.search import State
from ...sampling.transition import Transition
from ...sampling.tree import Tree, TreeConfig
from ...trainers.config import read
from ..contract import LATENT, Host
from .request import Absent, Saved, SearchRequest

FORMAT = "retort search 1"
FOLDER = "retort_searches"
METHODS: dict[str, tuple[type, type[State]]] = {
    state.method: (config, state)
    for config, state in (
        (TreeConfig, Tree), (BestOfConfig, BestOf), (SteeringConfig, Steering), (ValueConfig, Values),
        (FindConfig, Find),
    )
}  # fmt: skip
MOST_STEPS, HEADER_BYTES = 100_000, 100_000_000
PARTED = ("samples", "noise_mask")  # what of a LATENT may have several parts


def folder(host: Host) -> Path:
    """Where saved searches lie, beside the folder of training runs."""
    return host.runs_folder().with_name(FOLDER)


def save(host: Host, saved: Saved, name: str) -> Path:
    """Write a search under a name that no file has yet; its path. ValueError for a name that cannot be a file's."""
    request = saved.request
    state = {"sigmas": request.sigmas}
    for key, value in request.latent.items():
        if isinstance(value, Tensor):
            state[f"latent.{key}"] = value
        elif key in PARTED:
            state |= {f"latent.{key}/{i}": part for i, part in enumerate(parts_of(value))}
    items: list[dict[str, Any] | None] = []
    for i, item in enumerate(saved.states):
        if item is None:
            items.append(None)
            continue
        own, header = item.to_file()
        state |= {f"item.{i}.{k}": v for k, v in own.items()}
        items.append(header)
    method = next(m for m, (config, _) in METHODS.items() if config is type(request.config))
    header = {
        "prompt": request.prompt, "method": method, "config": asdict(cast(Any, request.config)),
        "transition": asdict(request.transition), "seed": request.seed,
        "noise": None if request.noise is None else int(request.noise.seed), "keep": request.keep,
        "latent": {k: v for k, v in request.latent.items() if isinstance(v, int | float | str)}, "items": items,
    }  # fmt: skip
    if request.boundary:
        header["boundary"] = request.boundary
    return write_new(folder(host), name, tensors(state, {"format": FORMAT, "search": json.dumps(header)}))


def rescue(host: Host, saved: Saved) -> Path:
    """Write a search that an error ended, under a name that says when."""
    return save(host, saved, time.strftime("unfinished %Y-%m-%d %H-%M-%S"))


def written(host: Host, name: str) -> int:
    """When the file of that name was written, in nanoseconds; 0 where there is none."""
    return (inside(folder(host)) / f"{checked_name(name)}.safetensors").changed()


def path_of(host: Host, name: str) -> Inside:
    """The file of the search of that name. ValueError where there is none."""
    path = inside(folder(host)) / f"{checked_name(name)}.safetensors"
    if not path.is_file():
        there = [n.removesuffix(".safetensors") for n in path.parent.files() if n.endswith(".safetensors")]
        raise ValueError(
            f"file: there is no search {name!r} in {path.parent} (found there: {', '.join(there[:8]) or 'nothing'}); "
            "Save Search writes them"
        )
    return path


def load(host: Host, name: str) -> Saved:
    """The search of that name. ValueError where there is none, or the file is broken, forged or something else's."""
    path = path_of(host, name)
    try:
        with safe_open(path.checked(), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError("it is no search that this version wrote")
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        refuse_types(found)
        return _saved(host, parse(metadata["search"].encode(), HEADER_BYTES, finite=False), found)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError, SafetensorError) as error:
        raise ValueError(f"file: {path.name} cannot be used ({error}); start a new search") from error


def _saved(host: Host, header: Mapping[str, Any], found: dict[str, Tensor]) -> Saved:
    method, items, seed, keep, noise = (header[name] for name in ("method", "items", "seed", "keep", "noise"))
    if method not in METHODS:
        raise ValueError(f"method {method!r:.80} is not known; this version has {', '.join(METHODS)}")
    for name, value, low, high in (("seed", seed, 0, 2**64), ("keep", keep, 1, 65), ("noise", noise or 0, 0, 2**64)):
        if not isinstance(value, int) or not low <= value < high:
            raise ValueError(f"{name} {value!r:.80} is out of range")
    boundary = header.get("boundary", 0.0)
    if not isinstance(boundary, float) or not 0 <= boundary < 1:
        raise ValueError(f"boundary {boundary!r:.80} is out of range")
    config, state = METHODS[method]
    settings: Any = read(config, header["config"], "config")
    sigmas, latent = found["sigmas"], _latent(host, header, found)
    if sigmas.ndim != 1 or not 2 <= len(sigmas) <= MOST_STEPS or not bool(torch.isfinite(sigmas).all()):
        raise ValueError("its sigmas are no schedule")
    for part in parts_of(latent["samples"]):
        if part.ndim not in (3, 4, 5) or not bool(torch.isfinite(part).all()) or len(items) != len(part):
            raise ValueError("its latents do not fit its items")
    request = SearchRequest(
        sigmas, latent, str(header["prompt"]), settings, read(Transition, header["transition"], "transition"), seed,
        None if noise is None else Absent(noise), keep, boundary,
    )  # fmt: skip
    states: list[State | None] = []
    for i, item in enumerate(items):
        own = {k.removeprefix(f"item.{i}."): v for k, v in found.items() if k.startswith(f"item.{i}.")}
        states.append(None if item is None else state.from_file(own, item, settings))
    return Saved(request, tuple(states))


def _latent(host: Host, header: Mapping[str, Any], found: Mapping[str, Tensor]) -> LATENT:
    """The LATENT that was searched from. KeyError where it is not whole."""
    latent: LATENT = {
        k: v for k, v in header["latent"].items() if isinstance(k, str) and isinstance(v, int | float | str)
    }
    for name in PARTED:
        count = sum(key.startswith(f"latent.{name}/") for key in found)
        if count:
            latent[name] = host.nested([found[f"latent.{name}/{i}"] for i in range(count)])
    names = [key.removeprefix("latent.") for key in found if key.startswith("latent.") and "/" not in key]
    return {**latent, **{name: found[f"latent.{name}"] for name in names}}
