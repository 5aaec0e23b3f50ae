"""Retort: distil, search, reflect and restore, as nodes for ComfyUI."""

WEB_DIRECTORY = "./extensions/comfyui"


async def comfy_entrypoint():
    """ComfyUI's door to the nodes, which are imported here and not with the package: others use it too."""
    from .nodes import RetortExtension

    return RetortExtension()
