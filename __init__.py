"""Retort: distil, search, reflect and restore, as nodes for ComfyUI."""

WEB_DIRECTORY = "./extensions/comfyui"


async def comfy_entrypoint():
    """What ComfyUI calls for the nodes. They are imported here and not with the package, which others use too."""
    from .nodes import RetortExtension

    return RetortExtension()
