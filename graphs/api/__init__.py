"""The names of `comfy_api.latest` that nodes use, without ComfyUI."""
