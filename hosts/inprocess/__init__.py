"""ComfyUI in this process: its node classes and its executor, without its server and without its page."""
