"""Retort: distil, search, reflect and restore, as nodes for ComfyUI."""
