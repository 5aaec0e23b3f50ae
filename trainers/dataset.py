"""A run's prompts and latents as one safetensors file, so that another process, or another day, can train on them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files.atomic import refuse_types, tensors, write_atomically
from ..files.folder import Inside, alone
from ..files.strangers import parse
from ..sampling.parts import Latent, Shape, each_of, parts_of, row, several, shape_of

FORMAT = 1
MOST = 1_000_000
HEADER_BYTES = 100_000_000  # as much as a safetensors file may have
# One entry of a CONDITIONING: token states (1, L, C) and what else the network is told.
Entry = tuple[Tensor, dict[str, Any]]
PLAIN = (bool, int, float, str)
NO_SIZE = "the size of the pictures is not known: connect an empty latent of that size, or images"


@dataclass
class Dataset:
    """Prompts with their encodings, latents as a VAE stores them, and the empty prompt.

    entries: one for each prompt. latents: each (C, H, W) or (C, T, H, W), or its parts, or None; then shape is that of
    the latents to be made. A single entry serves all latents. losers: of pairs whose winners are the latents, of the
    same shapes; strengths: how much better each winner is, infinite where that is certain. pictures: what the latents
    were encoded from, each (H, W, 3) of whole 255ths, for methods that degrade and encode them anew. references:
    latents that the network is shown beside each prompt, as an edit model is shown the picture before; a single one
    serves all. Raises ValueError when there is nothing to train on or counts differ.
    """

    entries: list[Entry]
    prompts: list[str]
    negative: Entry | None = None
    latents: Sequence[Latent] | None = None
    shape: Shape | None = None
    losers: Sequence[Latent] | None = None
    strengths: list[float] | None = None
    pictures: list[Tensor] | None = None
    references: Sequence[Tensor] | None = None

    def __post_init__(self) -> None:
        if not self.entries:
            raise ValueError("there are no prompts: write some, one in a line, or connect conditioning")
        if self.prompts and len(self.prompts) != len(self.entries):
            raise ValueError(f"there are {len(self.prompts)} prompts for {len(self.entries)} encodings")
        if self.latents is not None:
            if not self.latents:
                raise ValueError("the data set is empty: no latent arrived")
            if len(self.entries) == 1:
                self.entries = self.entries * len(self.latents)
                self.prompts = self.prompts * len(self.latents)
            if len(self.latents) != len(self.entries):
                raise ValueError(
                    f"there are {len(self.latents)} latents and {len(self.entries)} prompts: give each image its "
                    "caption, or one prompt for all"
                )
        elif self.shape is None:
            raise ValueError(NO_SIZE)
        if self.references is not None:
            self._give_references(list(self.references))
        if self.losers is not None:
            shapes = [shape_of(t) for t in self.latents or []]
            if [shape_of(t) for t in self.losers] != shapes or len(self.strengths or []) != len(shapes):
                raise ValueError("a pair is a winner, a loser of the same size, and a strength: these do not match")
        if self.pictures is not None:
            if len(self.pictures) != len(self.latents or []):
                raise ValueError(f"there are {len(self.pictures)} pictures for {len(self.latents or [])} latents")
            for i, picture in enumerate(self.pictures):
                if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != torch.uint8:
                    raise ValueError(f"picture {i} is {tuple(picture.shape)} of {picture.dtype}; give (H, W, 3) bytes")

    def _give_references(self, references: list[Tensor]) -> None:
        if len(self.entries) == 1 and self.latents is None:
            self.entries, self.prompts = self.entries * len(references), self.prompts * len(references)
        self.references = references * len(self.entries) if len(references) == 1 else references
        if len(self.references) != len(self.entries):
            raise ValueError(
                f"there are {len(references)} references for {len(self.entries)} samples: give each sample its own, or "
                "one for all"
            )

    def save(self, path: Path | Inside) -> None:
        """Write the file. ValueError for a conditioning that holds more than tensors, numbers and texts."""
        flat: dict[str, Tensor] = {}
        notes: dict[str, Any] = {}
        index: dict[int, int] = {}
        rows = []
        for entry in [*self.entries, *([self.negative] if self.negative else [])]:
            # One prompt for many images is stored once.
            key = index.setdefault(id(entry[0]), len(index))
            rows.append(key)
            flat[f"entry/{key}/tokens"] = entry[0]
            for name, value in entry[1].items():
                if isinstance(value, Tensor):
                    flat[f"entry/{key}/{name}"] = value
                elif value is None or isinstance(value, PLAIN):
                    notes[f"{key}/{name}"] = value
                else:
                    raise ValueError(
                        f"the conditioning holds {name!r} ({type(value).__name__}), which cannot be written to a job: "
                        "use plain text encodings, or train in the node"
                    )
        for kind, latents in (("latent", self.latents), ("loser", self.losers)):
            for i, latent in enumerate(latents or []):
                if isinstance(latent, Tensor):
                    flat[f"{kind}/{i}"] = latent
                else:
                    flat |= {f"{kind}/{i}/{number}": part for number, part in enumerate(latent)}
        for i, picture in enumerate(self.pictures or []):
            flat[f"picture/{i}"] = picture
        for i, reference in enumerate(self.references or []):
            flat[f"reference/{i}"] = reference
        if self.strengths is not None:
            flat["strengths"] = torch.tensor(self.strengths, dtype=torch.float64)
        header = {
            "entries": rows[: len(self.entries)],
            "negative": rows[-1] if self.negative else None,
            "prompts": self.prompts,
            "shape": self.shape,
            "notes": notes,
            "latents": None if self.latents is None else len(self.latents),
            "losers": self.losers is not None,
            "pictures": self.pictures is not None,
            "references": self.references is not None,
        }
        metadata = {"retort_dataset": str(FORMAT), "header": json.dumps(header)}
        # Clones: two entries may be views of one tensor, which the format refuses.
        write_atomically(path, tensors({k: v.detach().clone() for k, v in flat.items()}, metadata))

    @classmethod
    def load(cls, path: Path | Inside) -> Dataset:
        """Read a file that `save` wrote. ValueError names what is wrong with any other."""
        try:
            with safe_open(alone(path).checked(), "pt") as handle:
                metadata = handle.metadata() or {}
                flat = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"data set {path} cannot be read: {error}") from error
        if metadata.get("retort_dataset") != str(FORMAT):
            raise ValueError(f"{path} is no data set of this version of Retort")
        try:
            refuse_types(flat)
            header = parse(metadata["header"].encode(), HEADER_BYTES)
            notes: dict[int, dict[str, Any]] = {}
            for key, value in header["notes"].items():
                number, _, name = key.partition("/")
                if not (value is None or isinstance(value, PLAIN)):
                    raise ValueError(f"note {name!r:.60} is neither a number nor a text")
                notes.setdefault(int(number), {})[name] = value

            def entry(number: int) -> Entry:
                prefix = f"entry/{int(number)}/"
                extra = {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}
                return extra.pop("tokens"), {**extra, **notes.get(int(number), {})}

            made = {number: entry(number) for number in dict.fromkeys(header["entries"])}
            count = header["latents"]
            shape = header["shape"]
            if shape is not None:
                shape = tuple(tuple(n) if isinstance(n, list) else n for n in shape)
                parts = several(shape)
                if len(parts) not in (0, len(shape)) or not all(map(_is_shape, parts or [shape])):
                    raise ValueError(f"shape {shape!r:.60} is not that of a latent")
            if count is not None and not 0 < int(count) <= MOST:
                raise ValueError(f"{count!r:.60} latents")
            return cls(
                [made[n] for n in header["entries"]],
                [str(p) for p in header["prompts"]],
                None if header["negative"] is None else entry(header["negative"]),
                None if count is None else [_latent(flat, f"latent/{i}") for i in range(int(count))],
                shape,
                [_latent(flat, f"loser/{i}") for i in range(int(count))] if header.get("losers") else None,
                flat["strengths"].tolist() if header.get("losers") else None,
                [flat[f"picture/{i}"] for i in range(int(count))] if header.get("pictures") else None,
                [flat[f"reference/{i}"] for i in range(len(header["entries"]))] if header.get("references") else None,
            )
        except (KeyError, TypeError, AttributeError, OverflowError, ValueError) as error:
            raise ValueError(
                f"data set {path} is damaged ({type(error).__name__}: {error}); write the job anew"
            ) from error


def _is_shape(shape: Sequence[Any]) -> bool:
    whole = all(isinstance(n, int) and n > 0 for n in shape)
    return 1 < len(shape) < 5 and whole and math.prod(shape) < 2**31


def _latent(flat: Mapping[str, Tensor], name: str) -> Latent:
    if name in flat:
        return flat[name]
    count = 0
    while f"{name}/{count}" in flat:
        count += 1
    if count < 2:
        raise KeyError(name)
    return tuple(flat[f"{name}/{number}"] for number in range(count))


def refuse_missing(method: str, without: str, *, images: bool, empty: bool) -> None:
    """ValueError where a method lacks images, or the empty prompt; method: what messages call it. without: see
    `Objective.without_images`."""
    if images:
        raise ValueError(
            f"{method} learns from images here, and there are none: connect them to `images`, and their `vae`, or to "
            f"`latents` what VAE Encode made of them{without and f', or {without}'}"
        )
    if empty:
        raise ValueError(
            f"{method} compares with an empty prompt here: connect `negative`, or set cfg to 1 and prompt_dropout to 0"
        )


def entries_of(conditionings: Sequence[Any], where: str) -> list[Entry]:
    """The entries of one CONDITIONING for each sample. ValueError for one that combines several."""
    found = []
    for i, conditioning in enumerate(conditionings):
        if len(conditioning) != 1:
            raise ValueError(
                f"{where} {i} combines {len(conditioning)} encodings; training takes one text encoding for each sample"
            )
        tokens, extra = conditioning[0]
        # Copies: what a node is handed was made under inference mode and cannot be trained through.
        copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in extra.items()}
        found.append((tokens.clone(), copies))
    return found


def one_for_each(conditionings: list[Any], latents: Sequence[dict[str, Any]]) -> list[Any]:
    """Conditionings apart: core's Resolution Bucket puts those of a batch of latents into one, an entry for each."""
    if len(conditionings) == len(latents) and all(
        len(conditioning) == len(parts_of(latent["samples"])[0])
        for conditioning, latent in zip(conditionings, latents, strict=True)
    ):
        return [[entry] for conditioning in conditionings for entry in conditioning]
    return conditionings


def latents_of(given: Sequence[dict[str, Any]]) -> tuple[list[Latent] | None, Shape | None]:
    """(latents, shape) of LATENTs: single pictures, or only a size when all are empty. ValueError for masked ones."""
    rows: list[Latent] = []
    for i, latent in enumerate(given):
        if "noise_mask" in latent:
            raise ValueError(f"latent {i} has a mask, which training would ignore: take it off")
        samples = latent["samples"]
        rows += [row(samples, number) for number in range(len(parts_of(samples)[0]))]
    if not rows:
        return None, None
    if not any(bool(torch.count_nonzero(part)) for latent in rows for part in each_of(latent)):
        return None, shape_of(rows[0])
    return rows, None
