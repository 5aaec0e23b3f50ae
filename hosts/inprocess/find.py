"""Which ComfyUI the command line runs workflows on, if any. Nothing heavy is imported: the answer decides what is."""

from __future__ import annotations

import os
from pathlib import Path

from ...files.errors import UsageError

VARIABLE = "COMFYUI_PATH"
ROOT = Path(__file__).resolve().parents[2]


def find(given: Path | None = None) -> Path | None:
    """The folder of the ComfyUI to use: given, or that of COMFYUI_PATH, or the one whose custom_nodes holds Retort.

    UsageError for a folder that was named and holds no ComfyUI.
    """
    named = os.environ.get(VARIABLE)
    for folder, source in ((given, "--comfyui"), (Path(named) if named else None, VARIABLE)):
        if folder is not None:
            if not is_comfyui(folder):
                raise UsageError(
                    f"{source} {str(folder)!r} is no ComfyUI: it has no execution.py beside a folder comfy. Name the "
                    "folder that ComfyUI's main.py is in"
                )
            return folder.resolve()
    around = ROOT.parent.parent
    return around if ROOT.parent.name == "custom_nodes" and is_comfyui(around) else None


def is_comfyui(folder: Path) -> bool:
    """Whether a folder is a checkout of ComfyUI."""
    return (folder / "comfy" / "samplers.py").is_file() and (folder / "execution.py").is_file()
