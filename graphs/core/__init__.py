"""Core nodes of the headless host: ids, inputs, order, defaults and ranges as in ComfyUI."""

from __future__ import annotations

from ..api.schema import ComfyNode
from . import conditioning, coordinates, images, latents, loaders, parts, primitives, sampling

NODES: list[type[ComfyNode]] = [
    node
    for module in (loaders, conditioning, latents, sampling, parts, coordinates, images, primitives)
    for node in module.NODES
]
