"""Where a run finds its models and images and leaves its results."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from ...files.errors import UsageError
from ...files.paths import PathError, inside

# The embedded weights, laid out like the user's own models.
EMBEDDED = Path(__file__).resolve().parents[2] / "models"
# A folder under each kind's name, as in ComfyUI's models folder; some have an older name beside the present one.
KINDS = {
    "checkpoints": ("checkpoints",),
    "loras": ("loras",),
    "vae": ("vae",),
    "diffusion_models": ("diffusion_models", "unet"),
    "text_encoders": ("text_encoders", "clip"),
    "diffusers": ("diffusers",),
}
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Folders:
    """models: roots laid out as ComfyUI's models folder. inputs: where LoadImage looks. output: where results go."""

    models: tuple[Path, ...] = ()
    inputs: tuple[Path, ...] = field(default_factory=lambda: (Path("input"),))
    output: Path = Path("output")

    @classmethod
    def from_environment(cls) -> Folders:
        """RETORT_MODELS: further model roots, separated like PATH."""
        given = os.environ.get("RETORT_MODELS", "")
        return cls(models=tuple(Path(p).expanduser() for p in given.split(os.pathsep) if p))

    def roots(self, kind: str) -> list[Path]:
        """Folders that hold files of a kind, the user's before the embedded one."""
        return [root / name for root in (*self.models, EMBEDDED) for name in KINDS[kind]]

    def names(self, kind: str) -> list[str]:
        """Every safetensors file of a kind (for "diffusers", every pipeline folder), with forward slashes."""
        if kind == "diffusers":
            roots = [root for root in self.roots(kind) if root.is_dir()]
            return [p.parent.relative_to(r).as_posix() for r in roots for p in sorted(r.rglob("model_index.json"))]
        return _listed(self.roots(kind), (".safetensors", ".sft"))

    def images(self) -> list[str]:
        """Every image that LoadImage may name."""
        return _listed(self.inputs, IMAGES, deep=False)

    def model(self, kind: str, name: str) -> Path:
        """UsageError says where a missing one belongs, PathError that the name leaves its folder."""
        found = _find(self.roots(kind), name)
        if found is not None:
            return found
        places = " or ".join(str(root / KINDS[kind][0]) for root in self.models)
        here = self.names(kind)
        raise UsageError(
            f"{kind} file {name!r} was not found. Put it into {places or f'DIR/{kind} and pass --models DIR'}"
            f" (found there: {', '.join(here[:8]) or 'nothing'})"
        )

    def image(self, name: str) -> Path:
        """The image of a LoadImage widget, with ComfyUI's " [input]" and " [output]" endings; errors as `model`."""
        roots = list(self.inputs)
        for ending, folders in ((" [output]", [self.output]), (" [input]", roots), (" [temp]", [self.output])):
            if name.endswith(ending):
                name, roots = name.removesuffix(ending), folders
        found = _find(roots, name)
        if found is None:
            places = ", ".join(str(r) for r in roots)
            raise UsageError(f"image {name!r} was not found in {places}. Put it there, or pass --input DIR")
        return found


def _find(roots: list[Path], name: str) -> Path | None:
    refused = None
    for root in roots:
        try:
            path = inside(root, name)
        except PathError as error:
            refused = refused or error
            continue
        if path.is_file() or (path / "model_index.json").is_file():
            return path
    if refused is not None:
        raise refused
    return None


def _listed(roots, endings: tuple[str, ...], deep: bool = True) -> list[str]:
    names: dict[str, None] = {}
    for root in roots:
        if not root.is_dir():
            continue
        for path in sorted(root.rglob("*") if deep else root.iterdir()):
            if path.suffix.lower() in endings and path.is_file() and root.resolve() in path.resolve().parents:
                names[path.relative_to(root).as_posix()] = None
    return list(names)


_current: ContextVar[Folders | None] = ContextVar("retort_folders", default=None)


def current() -> Folders:
    """The folders of the run in progress, or those of the environment."""
    return _current.get() or Folders.from_environment()


@contextmanager
def use(folders: Folders) -> Iterator[None]:
    """Make `folders` current inside the block."""
    token = _current.set(folders)
    try:
        yield
    finally:
        _current.reset(token)
