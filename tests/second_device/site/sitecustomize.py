"""Imported by each Python with this folder in its PYTHONPATH: ComfyUI's servers and jobs take the device."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("second_in_comfyui", Path(__file__).parents[1] / "in_comfyui.py")
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
_module.begin()
