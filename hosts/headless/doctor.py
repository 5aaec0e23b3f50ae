"""What this installation has, what is missing and how to get it."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from ...files.errors import UsageError
from ..inprocess.find import find
from . import embedded, extra_paths, folders

# Package, what it is for, the extra that brings it.
_OPTIONAL = (
    ("diffusers", "the embedded model and real checkpoints outside ComfyUI", "diffusers"),
    ("transformers", "text encoders of real checkpoints outside ComfyUI", "diffusers"),
    ("peft", "LoRAs on real checkpoints outside ComfyUI, training", "train"),
    ("accelerate", "training on several GPUs", "train"),
    ("scikit-learn", "building the embedded model, benchmarks", "test"),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report. ok: present; a missing optional part is no failure, and `remedy` says how to get it."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Every finding, in the order to show them."""
    return [*_system(), _host(), *_packages(), *_weights(), *_model_folders()]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _system() -> list[Finding]:
    import torch

    found = [Finding("Python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        device = f"{card.name}, {card.total_memory / 2**30:.0f} GiB"
    else:
        device = f"CPU, {torch.get_num_threads()} threads"
    return [*found, Finding("torch", True, torch.__version__), Finding("device", True, device)]


def _host() -> Finding:
    try:
        root = find()
    except UsageError as error:
        return Finding("ComfyUI", False, str(error), "workflows run on the built-in host")
    if root is not None:
        return Finding("ComfyUI", True, f"{root}; workflows run on it, unless --built-in is given")
    return Finding(
        "ComfyUI",
        False,
        "not found; workflows run on the built-in host",
        "name its folder by --comfyui or COMFYUI_PATH; `python install.py link PATH` puts Retort into it",
    )


def _packages() -> list[Finding]:
    rows = []
    for package, purpose, extra in _OPTIONAL:
        version = _version(package)
        detail = version or f"missing: {purpose}"
        rows.append(Finding(package, version is not None, detail, "" if version else f'pip install "retort[{extra}]"'))
    xformers = _version("xformers")
    rows.append(Finding("xformers", True, xformers or "not installed; torch's own attention is used"))
    return rows


def _weights() -> list[Finding]:
    missing = [name for name in embedded.FILES if not (folders.EMBEDDED / name).is_file()]
    if not missing:
        return [Finding("embedded model", True, f"{len(embedded.FILES)} checkpoints in {folders.EMBEDDED}")]
    return [
        Finding(
            "embedded model",
            False,
            f"missing: {', '.join(missing)}",
            "reinstall Retort, or make them with `python -m retort.models.build`",
        )
    ]


def _model_folders() -> list[Finding]:
    here = folders.current()
    rows = [_root(root) for root in here.models] + [
        _config(path) for path in extra_paths.files(here.models, here.configs)
    ]
    return rows or [Finding("own models", True, "none; set RETORT_MODELS or pass --models DIR (laid out as ComfyUI's)")]


def _root(root: Path) -> Finding:
    if not root.is_dir():
        return Finding("own models", False, f"{root} is not a folder", "mend RETORT_MODELS or --models")
    counted = (f"{_count(kind, *(root / name for name in names))} {kind}" for kind, names in folders.KINDS.items())
    return Finding("own models", True, f"{root}: {', '.join(counted)}")


def _config(path: Path) -> Finding:
    """What a file of further folders adds; a folder that is not there does no harm, as in ComfyUI."""
    try:
        extras = extra_paths.read(path)
    except UsageError as error:
        return Finding("further models", False, str(error))
    used = [extra for extra in extras if extra.kind in (*folders.KINDS, *folders.OWN_KINDS)]
    listed = [
        f"{extra.kind} {extra.path} ({_held(extra)}{', searched first' if extra.first else ''})" for extra in used
    ]
    return Finding("further models", True, f"{path}: {'; '.join(listed) or 'nothing that is used here'}")


def _held(extra: extra_paths.Extra) -> str:
    if not extra.path.is_dir():
        return "there is no such folder"
    return f"{_count(extra.kind, extra.path)} found" if extra.kind in folders.KINDS else "there"


def _count(kind: str, *roots: Path) -> int:
    return len(folders.listed(kind, roots))
