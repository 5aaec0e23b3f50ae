"""Core nodes of the headless host: ids, inputs, order and defaults as in ComfyUI."""
