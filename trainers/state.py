"""The whole state of a run in one safetensors file: weights, optimisers, averages, buffers, counters, configuration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files.atomic import refuse_types, write_tensors
from ..files.folder import Inside, alone
from ..files.strangers import parse
from .config import MOST_STEPS, RunConfig, differences
from .optimisers import LEARNT, WHOLE, expected_state, rebuilt

FORMAT = 1


def save(
    path: Path | Inside, config: RunConfig, groups: Mapping[str, Mapping[str, Tensor]], counters: Mapping[str, Any]
) -> None:
    """Write named groups of tensors, numbers and the configuration, atomically. OSError names the file."""
    flat = {f"{group}/{key}": value for group, values in groups.items() for key, value in values.items()}
    metadata = {
        "retort_state": str(FORMAT),
        "config": json.dumps(config.to_json()),
        "counters": json.dumps(dict(counters)),
    }
    write_tensors(path, flat, metadata)


def load(path: Path | Inside, config: RunConfig | None) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Groups and counters of a state file. ValueError when it is damaged, foreign, or of another configuration."""
    metadata, flat = _read(path)
    counters = _known(path, metadata, flat, config)
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = value
    return groups, counters


def refuse_other(path: Path | Inside, config: RunConfig) -> None:
    """ValueError where there is a state file that a run with this configuration could not go on from.

    Only its head is read, so that a request is refused before anything is loaded or written for it.
    """
    if alone(path).is_file():
        _known(path, _read(path, whole=False)[0], {}, config)


def _read(path: Path | Inside, whole: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors, none unless whole) of a state file; ValueError when it cannot be read."""
    try:
        with safe_open(alone(path).checked(), "pt") as handle:
            names = handle.keys() if whole else ()
            return handle.metadata() or {}, {key: handle.get_tensor(key) for key in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); start anew under another name") from error


def _known(
    path: Path | Inside, metadata: Mapping[str, str], flat: Mapping[str, Tensor], config: RunConfig | None
) -> dict[str, Any]:
    """The counters of a state that is whole and was made with a configuration; ValueError says what is wrong."""
    if metadata.get("retort_state") != str(FORMAT):
        raise ValueError(f"{path} is no training state of this version of Retort; start anew under another name")
    try:
        refuse_types(flat)
        before = parse(metadata["config"].encode())
        counters = _counters(parse(metadata["counters"].encode(), finite=False))
        changed = [] if config is None else differences(_completed(before, config), config.to_json())
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}); start anew under another name"
        ) from error
    if changed:
        raise ValueError(
            f"run {path.parent.name!r} was started with other settings ({'; '.join(changed[:6])}): give it another "
            "name, or set them back to go on"
        )
    return counters


def _counters(found: dict[str, Any]) -> dict[str, Any]:
    """The run's counters; ValueError for numbers that no run has."""
    for name, most in (("done", MOST_STEPS), ("position", 2**62)):
        if not isinstance(found[name], int) or not 0 <= found[name] <= most:
            raise ValueError(f"{name} is {found[name]!r:.40}")
    return found


def optimiser_tensors(optimiser: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """An optimiser's state by "parameter|entry", for parameters in the order of their groups.

    "|entry" are numbers of the optimiser's own; "parameter|entry.part" parts of a tensor that is made of several.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in zip(names, _parameters(optimiser), strict=True):
        for entry, value in optimiser.state.get(parameter, {}).items():
            if hasattr(value, "__tensor_flatten__"):
                found |= {f"{name}|{entry}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]}
            else:
                found[f"{name}|{entry}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    group = optimiser.param_groups[0]
    for entry in LEARNT:
        if entry in group:
            # In Python they are double precision.
            kind = torch.int64 if isinstance(group[entry], int) else torch.float64
            found[f"|{entry}"] = torch.tensor(group[entry], dtype=kind)
    return found


def restore_optimiser(optimiser: torch.optim.Optimizer, names: list[str], saved: Mapping[str, Tensor]) -> None:
    """Put back what `optimiser_tensors` gave. ValueError when it belongs to other parameters."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in saved.items():
        name, _, entry = key.rpartition("|")
        by_name.setdefault(name, {})[entry] = value
    for entry, value in by_name.pop("", {}).items():
        for group in optimiser.param_groups:
            if entry not in LEARNT or entry not in group or value.ndim or not bool(value.isfinite()):
                raise ValueError(f"the saved optimiser's {entry!r:.40} is not one of its numbers: start anew")
            group[entry] = value.item()
    if not set(by_name) <= set(names):
        raise ValueError(f"the saved optimiser belongs to other layers, such as {sorted(set(by_name) - set(names))[0]}")
    for name, parameter in zip(names, _parameters(optimiser), strict=True):
        entries = by_name.get(name)
        for entry in WHOLE:
            if entries and entry in entries and entries[entry].shape != parameter.shape:
                raise ValueError(
                    f"the saved optimiser's {entry} of {name} has another shape; start anew under another name"
                )
        if entries:
            optimiser.state[parameter] = _state(optimiser, name, entries, parameter)


def _state(
    optimiser: torch.optim.Optimizer, name: str, entries: Mapping[str, Tensor], parameter: Tensor
) -> dict[str, Tensor | int]:
    found = {entry: _own(value, parameter.device) for entry, value in entries.items() if "." not in entry}
    parts: dict[str, dict[str, Tensor]] = {}
    for entry, value in entries.items():
        whole, dot, part = entry.partition(".")
        if dot:
            parts.setdefault(whole, {})[part] = value.to(parameter.device, copy=True)
    expected = expected_state(optimiser)
    if expected and expected not in (found | parts):
        raise ValueError(
            f"the saved optimiser's {name} has {', '.join(sorted(entries))[:80]} and no {expected}: it was made by "
            "another package; install that one again, or start anew under another name"
        )
    return found | {entry: rebuilt(entry, of, parameter) for entry, of in parts.items()}


def _own(value: Tensor, device: torch.device) -> Tensor | int:
    if value.ndim:
        return value.to(device, copy=True)
    # The count of steps: beside its weight, where fused AdamW keeps it; a number, where the 8-bit one does.
    return int(value) if value.dtype == torch.int64 else value.to(device, copy=True)


def _parameters(optimiser: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimiser.param_groups:
        yield from group["params"]


def restore(mine: Mapping[str, Tensor], saved: Mapping[str, Tensor], what: str) -> None:
    """Copy saved tensors over those in use. ValueError names one that is missing or has another shape."""
    for name, tensor in mine.items():
        if name not in saved:
            raise ValueError(f"the saved {what} lacks {name}; start anew under another name")
        if saved[name].shape != tensor.shape:
            raise ValueError(
                f"the saved {what} has {name} of shape {tuple(saved[name].shape)}, now it is {tuple(tensor.shape)}; "
                "it belongs to another model or rank"
            )
        with torch.no_grad():
            tensor.copy_(saved[name])


def _completed(before: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """A run's settings with the defaults of those that it was started before there were."""
    found = dict(before)
    for name in ("objective", "training", "lora"):
        fields = dataclasses.fields(getattr(config, name))
        defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
        found[name] = {**defaults, **before[name]}
    return found
