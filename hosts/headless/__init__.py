"""The same names and nodes without ComfyUI: for the first run, for tests and for batch jobs."""
