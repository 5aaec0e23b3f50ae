"""ComfyUI's MODEL, GUIDER, VAE, CLIP and CONDITIONING, turned into the four contracts."""
