"""Where a run finds its models and images and leaves its results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

from ...files.errors import UsageError
from ...files.paths import PathError, below, dead_link, files_below, inside, walked
from .. import presets
from . import extra_paths

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
# Of models that nodes of ours read.
OWN_KINDS = ("rewards", "captioners", "gaussian_statistics", presets.KIND)
ENDINGS, PIPELINE = (".safetensors", ".sft"), "model_index.json"
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Folders:
    """models: roots laid out as ComfyUI's models folder. inputs: where LoadImage looks. output: where results go.

    configs: files that name further folders of models, as ComfyUI's extra_model_paths.yaml; the one beside a folder
    of models is read too, as ComfyUI reads it.
    """

    models: tuple[Path, ...] = ()
    inputs: tuple[Path, ...] = field(default_factory=lambda: (Path("input"),))
    output: Path = Path("output")
    configs: tuple[Path, ...] = ()

    @classmethod
    def from_environment(cls) -> Folders:
        """RETORT_MODELS: further model roots, separated like PATH."""
        given = os.environ.get("RETORT_MODELS", "")
        return cls(models=tuple(Path(p).expanduser() for p in given.split(os.pathsep) if p))

    def extras(self) -> list[extra_paths.Extra]:
        """The folders that the configs name, in ComfyUI's order. UsageError for a config that cannot be read."""
        return extra_paths.read_all(self.models, self.configs)

    def own(self, kind: str) -> list[Path]:
        """The user's folders of a kind, in the order in which they are searched; the first is written to."""
        named = [extra for extra in self.extras() if extra.kind == kind]
        places = (presets.FOLDER,) if kind == presets.KIND else KINDS.get(kind, (kind,))
        laid = [root / name for root in self.models for name in places]
        # Each that is to be first goes before those that were named so far, as in ComfyUI.
        first = [extra.path for extra in reversed(named) if extra.first]
        return list(dict.fromkeys([*first, *laid, *(extra.path for extra in named)]))

    def loras(self) -> list[Path]:
        """The user's folders of LoRAs, of which the first is written to: one among the results where there are none."""
        return self.own("loras") or [self.output / "loras"]

    def roots(self, kind: str) -> list[Path]:
        """Folders that hold files of a kind, the user's before the embedded one."""
        own = self.loras() if kind == "loras" else self.own(kind)
        return [*own, *(EMBEDDED / name for name in KINDS.get(kind, (kind,)))]

    def names(self, kind: str) -> list[str]:
        """The user's files of a kind and the embedded ones; see `listed`."""
        return listed(kind, self.roots(kind))

    def images(self) -> list[str]:
        """Every image that LoadImage may name."""
        return files_below(self.inputs, IMAGES, deep=False)

    def model(self, kind: str, name: str) -> Path:
        """UsageError says where a missing one belongs, PathError that the name leaves its folder."""
        roots = self.roots(kind)
        found = _find(roots, name, below)
        if found is not None:
            return found
        places = " or ".join(map(str, self.own(kind)))
        here = self.names(kind)
        raise UsageError(
            f"{kind} file {name!r} was not found{_dead(roots, name)}. Put it into "
            f"{places or f'DIR/{kind} and pass --models DIR'} (found there: {', '.join(here[:8]) or 'nothing'})"
        )

    def image(self, name: str) -> Path:
        """The image of a LoadImage widget, with ComfyUI's " [input]" and " [output]" endings; errors as `model`."""
        roots, way = list(self.inputs), below
        for ending, folders in ((" [output]", [self.output]), (" [input]", roots), (" [temp]", [self.output])):
            if name.endswith(ending):
                # Runs and sets of strangers may lie among the results.
                name, roots, way = name.removesuffix(ending), folders, below if folders is roots else inside
        found = _find(roots, name, way)
        if found is None:
            places = ", ".join(str(r) for r in roots)
            raise UsageError(
                f"image {name!r} was not found in {places}{_dead(roots, name)}. Put it there, or pass --input DIR"
            )
        return found


def listed(kind: str, roots: Iterable[Path]) -> list[str]:
    """Every safetensors file in folders of a kind (for "diffusers", every pipeline's folder), with forward slashes."""
    if kind != "diffusers":
        return files_below(roots, ENDINGS)
    found = {root: [folder for folder, _, files in walked(root) if PIPELINE in files] for root in roots}
    return list(dict.fromkeys(path.relative_to(root).as_posix() for root in found for path in found[root]))


def _find(roots: list[Path], name: str, way: Callable[[Path, str], Path]) -> Path | None:
    refused = None
    for root in roots:
        try:
            path = way(root, name)
        except PathError as error:
            refused = refused or error
            continue
        try:
            if path.is_file() or (path / PIPELINE).is_file():
                return path
        except OSError as error:
            raise UsageError(
                f"{path} cannot be looked at ({error.strerror}): see to its rights, or its disk"
            ) from error
    if refused is not None:
        raise refused
    return None


def _dead(roots: list[Path], name: str) -> str:
    found = dead_link(roots, name)
    return f": {found}" if found else ""


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
