"""What a job trains on, by the names of files in the model folders of whoever runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import Any, Literal

from .config import read

MERGED, MERGED_EXPERT = "base.safetensors", "other_expert.safetensors"
MOST_LORAS = 32
ENDINGS = (".safetensors", ".sft")

BaseKind = Literal["embedded", "checkpoint", "diffusion_model", "diffusers", "merged"]
VaeKind = Literal["embedded", "checkpoint", "vae", "diffusers"]
# Which field holds the name.
_FIELD = {"embedded": "variant", "diffusers": "folder"}


def checked_path(value: str, where: str, endings: tuple[str, ...] = ENDINGS) -> str:
    """A name inside a folder of models, subfolders allowed. ValueError for one that could lead elsewhere."""
    windows = PureWindowsPath(value)
    if not value.strip() or len(value) > 1000 or not value.isprintable():
        raise ValueError(f"{where} must be a file's name, got {value!r:.80}")
    if windows.drive or windows.root or ".." in windows.parts or ":" in value or value.startswith("~"):
        raise ValueError(f"{where} {value!r:.80} leaves its folder: give a name inside the folder of models")
    if endings and not value.lower().endswith(endings):
        raise ValueError(f"{where} {value!r:.80} is no safetensors file: other kinds can run code when they are opened")
    return value


def _check_named(part: Base | Vae, where: str) -> None:
    needed = _FIELD.get(part.kind, "file")
    for name in ("variant", "file", "folder"):
        given = getattr(part, name)
        # A merged network does not show in which coordinates it samples.
        if name == needed and not given:
            raise ValueError(f"{where}.{name} is missing: kind {part.kind!r} needs it")
        if given and name != needed and (part.kind, name) != ("merged", "variant"):
            raise ValueError(f"{where}.{name} does not belong to kind {part.kind!r}; leave it out")
    if part.file:
        checked_path(part.file, f"{where}.file")
    if part.folder:
        checked_path(part.folder, f"{where}.folder", ())


@dataclass(frozen=True)
class AppliedLora:
    """A LoRA that is part of the base: a file in the loras folder, and its strength."""

    file: str
    strength: float = 1.0

    def __post_init__(self) -> None:
        checked_path(self.file, "file")
        if not abs(self.strength) <= 100:
            raise ValueError(f"strength must be between -100 and 100, got {self.strength!r}")


@dataclass(frozen=True)
class Base:
    """What is trained on.

    kind: "embedded" (variant), "checkpoint", "diffusion_model" (file in that folder of models), "diffusers" (folder),
    "merged" (a file beside job.json; variant "eps" where it is one of the embedded eps twins). shift: of the timesteps,
    None as the file says. loras: applied in this order.
    """

    kind: BaseKind
    variant: str = ""
    file: str = ""
    folder: str = ""
    shift: float | None = None
    loras: tuple[AppliedLora, ...] = ()

    def __post_init__(self) -> None:
        _check_named(self, "base")
        if self.kind == "merged" and (self.file not in (MERGED, MERGED_EXPERT) or self.variant not in ("", "eps")):
            raise ValueError(
                f'base.file must be {MERGED} or {MERGED_EXPERT} for kind "merged", and variant "eps" or nothing'
            )
        if self.shift is not None and not 0 < self.shift <= 1e4:
            raise ValueError(f"base.shift must be above 0 and at most 10000, got {self.shift!r}")
        if len(self.loras) > MOST_LORAS:
            raise ValueError(f"base.loras has {len(self.loras)} entries; {MOST_LORAS} are the most")

    def to_json(self) -> dict[str, Any]:
        """JSON values, without what is empty; `read_base` gives it back."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v not in ("", None, ())}


@dataclass(frozen=True)
class Vae:
    """What decodes previews, named as a Base; kind "vae" is a file in the vae folder."""

    kind: VaeKind
    variant: str = ""
    file: str = ""
    folder: str = ""

    def __post_init__(self) -> None:
        _check_named(self, "vae")

    def to_json(self) -> dict[str, Any]:
        """JSON values, without what is empty."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v}


def read_base(values: Any, where: str = "base") -> Base:
    """A Base from JSON values. ValueError names the field, which is that of a job."""
    if not isinstance(values, Mapping):
        raise ValueError(
            f"{where} must be an object such as {{'kind': 'embedded', 'variant': 'flow'}}, got {values!r:.60}"
        )
    loras = values.get("loras", [])
    if not isinstance(loras, list):
        raise ValueError(f"{where}.loras must be a list")
    plain = read(Base, {k: v for k, v in values.items() if k != "loras"}, where)
    applied = tuple(read(AppliedLora, lora, f"{where}.loras[{i}]") for i, lora in enumerate(loras[: MOST_LORAS + 1]))
    return dataclasses.replace(plain, loras=applied)
