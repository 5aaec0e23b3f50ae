"""Workflows read and run without ComfyUI: its node interface, the graph reader, the executor, core nodes."""
