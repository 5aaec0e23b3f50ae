"""Models, text encoders and VAEs by the names of their files within the model folders, each with its origin.

The origin is what a job calls a MODEL or VAE (`trainers.sources`), so that another process can load the same one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...files.errors import UsageError
from ...trainers import sources
from . import embedded, folders
from .model import Clip, Model, Origin, Vae

# The three that a checkpoint or a folder of diffusers gives; a file may lack a text encoder or a VAE.
Loaded = tuple[Model, Clip | None, Vae | None]


def checkpoint(name: str) -> Loaded:
    """MODEL, CLIP and VAE of a file in models/checkpoints. UsageError for a file that is missing or cannot be read."""
    path = folders.current().model("checkpoints", name)
    if path.is_relative_to(folders.EMBEDDED):
        return _embedded(path.relative_to(folders.EMBEDDED).as_posix())
    from .diffusers_loader import load_checkpoint

    return _with_origin(load_checkpoint(path), "checkpoint", file=name)


def diffusers(name: str) -> Loaded:
    """MODEL, CLIP and VAE of a folder in models/diffusers. UsageError as in `checkpoint`."""
    from .diffusers_folder import load_folder

    return _with_origin(load_folder(folders.current().model("diffusers", name)), "diffusers", folder=name)


def diffusion_model(name: str) -> Model:
    """The MODEL of a file in models/diffusion_models. UsageError as in `checkpoint`."""
    from .diffusers_loader import load_diffusion_model

    model = load_diffusion_model(folders.current().model("diffusion_models", name))
    return _named(model, sources.Base("diffusion_model", file=name))


def vae(name: str) -> Vae:
    """The VAE of a file in models/vae. UsageError as in `checkpoint`."""
    from .diffusers_loader import load_vae

    return replace(load_vae(folders.current().model("vae", name)), origin=sources.Vae("vae", file=name))


def _embedded(name: str) -> Loaded:
    if name not in embedded.FILES:
        raise UsageError(f"{name} is not a checkpoint of the embedded model; use the node RetortEmbeddedModel")
    model, _, vae = embedded.load(embedded.FILES[name])
    # The file holds no text encoder, here as in ComfyUI.
    return model, None, vae


def _named(model: Model, base: sources.Base) -> Model:
    return replace(model, origin=Origin(base, model.schedule))


def _with_origin(loaded: Loaded, kind: Any, **name: Any) -> Loaded:
    model, clip, vae = loaded
    named = None if vae is None else replace(vae, origin=sources.Vae(kind, **name))
    return _named(model, sources.Base(kind, **name)), clip, named
