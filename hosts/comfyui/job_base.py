"""What a job calls a ComfyUI MODEL and VAE, and the way back; see `hosts.contract`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import comfy.options
import comfy.sd
import comfy.utils
import folder_paths
from comfy.cli_args import args
from safetensors.torch import load_file

from ...files.folder import inside
from ...models.loader import CHECKPOINTS, FOLDER
from ...trainers import sources
from . import base as named
from . import model_files

KINDS: dict[str, tuple[Any, str]] = {
    "checkpoint": ("checkpoint", "checkpoints"), "diffusion model": ("diffusion_model", "diffusion_models")
}  # fmt: skip


def describe_base(model) -> sources.Base | None:
    """See `hosts.contract`."""
    what = named.describe(model)
    if what is None:
        return None
    for variant, name in CHECKPOINTS.items():
        if Path(what["file"]).resolve() == (FOLDER / name).resolve():
            return sources.Base("embedded", variant, shift=what["shift"])
    if what["loader"] not in KINDS:
        return None
    kind, folder = KINDS[what["loader"]]
    file = _inside(what["file"], folder)
    return None if file is None else sources.Base(kind, file=file, shift=what["shift"])


def merge_base(model, folder: Path, file: str) -> sources.Base:
    """See `hosts.contract`."""
    what = named.save_merged(model, folder / file)
    variant = "eps" if what["loader"] == "embedded eps" else ""
    return sources.Base("merged", variant, file, shift=what["shift"])


def describe_vae(vae) -> sources.Vae | None:
    """See `hosts.contract`."""
    if vae.patcher.cached_patcher_init is None:
        return None
    factory, given = vae.patcher.cached_patcher_init[:2]
    if Path(given[0]).resolve() == (FOLDER / CHECKPOINTS["flow"]).resolve():
        return sources.Vae("embedded", "flow")
    if factory is comfy.sd.load_checkpoint_vae_patcher:
        name = _inside(given[0], "checkpoints")
        return None if name is None else sources.Vae("checkpoint", file=name)
    name = _inside(given[0], "vae") if factory is comfy.sd.load_vae_patcher else None
    return None if name is None else sources.Vae("vae", file=name)


def load_base(base: sources.Base, folder: Path):
    """See `hosts.contract`."""
    if base.kind == "diffusers":
        raise ValueError('base.kind "diffusers" is loaded without ComfyUI: start the job without --comfyui')
    loader = {"diffusion_model": "diffusion model"}.get(base.kind, "checkpoint")
    if base.variant.startswith("eps"):
        loader = "embedded eps"
    if base.kind == "merged":
        file = str((inside(folder) / base.file).checked())
    elif base.kind == "embedded":
        if base.variant not in CHECKPOINTS:
            raise ValueError(f"base.variant {base.variant!r} is not known; use one of {', '.join(CHECKPOINTS)}")
        file = str(FOLDER / CHECKPOINTS[base.variant])
    else:
        file = str(model_files.path_of(KINDS[loader][1], base.file))
    model = named.load_described({"loader": loader, "file": file, "shift": base.shift})
    for lora in base.loras:
        state = load_file(model_files.path_of("loras", lora.file))
        model = comfy.sd.load_lora_for_models(model, None, state, lora.strength, 0.0)[0]
    return model


def load_vae(vae: sources.Vae):
    """See `hosts.contract`."""
    if vae.kind == "diffusers":
        raise ValueError('vae.kind "diffusers" is loaded without ComfyUI: start the job without --comfyui')
    if vae.kind == "vae":
        file = str(model_files.path_of("vae", vae.file))
        state, metadata = comfy.utils.load_torch_file(file, return_metadata=True)
        made = comfy.sd.VAE(sd=state, metadata=metadata)
        made.throw_exception_if_invalid()
        return made
    if vae.kind == "embedded":
        file = str(FOLDER / CHECKPOINTS["flow"])
    else:
        file = str(model_files.path_of("checkpoints", vae.file))
    return comfy.sd.load_checkpoint_guess_config(file, output_clip=False, output_model=False)[2]


def job_arguments() -> list[str]:
    """See `hosts.contract`."""
    # ComfyUI's own arguments decide precision and folders, so the job gets them too; it opens no port.
    given = sys.argv[1:] if comfy.options.args_parsing else ["--cpu"] * args.cpu
    output = folder_paths.get_output_directory()
    where = Path(folder_paths.__file__).resolve().parent
    # Packs add folders of models too, and the job must look, and write, where its starter does.
    kinds = ("loras", "vae", *(folder for _, folder in KINDS.values()))
    roots = [f"{kind}={os.path.abspath(root)}" for kind in kinds for root in folder_paths.get_folder_paths(kind)]
    models = [part for root in roots for part in ("--models", root)]
    return ["--comfyui", str(where), *models, "--output", os.path.abspath(output), "--", *given]


def _inside(file: str, kind: str) -> str | None:
    """The name by which a folder of models knows a file; None for a file elsewhere."""
    for root in folder_paths.get_folder_paths(kind):
        path, folder = Path(os.path.abspath(file)), Path(os.path.abspath(root))
        if path.is_relative_to(folder) and path.suffix.lower() in sources.ENDINGS:
            return path.relative_to(folder).as_posix()
    return None
