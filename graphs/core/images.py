"""Core's image nodes: load, save, preview, join."""

from __future__ import annotations

import torch
from torch import Tensor

from ...files.errors import UsageError
from ...files.pictures import load_image
from ...hosts.headless import folders
from ..api import io, ui
from ..file_inputs import ImageFile
from .declare import core_node

_COLOURS = {"white": (1.0,) * 3, "black": (0.0,) * 3, "red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0),
            "blue": (0.0, 0.0, 1.0)}  # fmt: skip


@core_node(
    display_name="Load Image",
    category="image",
    inputs=[ImageFile("image")],
    outputs=[io.Image.Output(), io.Mask.Output()],
)
def LoadImage(image: str):
    """An image of the input folder, and its transparency as a mask."""
    return io.NodeOutput(*load_image(folders.current().image(image)))


class SaveImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaveImage",
            display_name="Save Image",
            category="image",
            description="PNG files in the output folder that carry their workflow.",
            inputs=[
                io.Image.Input("images"),
                io.String.Input("filename_prefix", default="ComfyUI", tooltip="May name subfolders and %width% etc."),
            ],
            outputs=[io.Image.Output(display_name="images")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images: Tensor, filename_prefix: str):
        return io.NodeOutput(images, ui=ui.ImageSaveHelper.get_save_images_ui(images, filename_prefix, cls))


class PreviewImage(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="PreviewImage",
            display_name="Preview Image",
            category="image",
            description="PNG files in the folder preview of the output folder.",
            inputs=[io.Image.Input("images")],
            outputs=[io.Image.Output(display_name="images")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images: Tensor):
        return io.NodeOutput(images, ui=ui.PreviewImage(images, cls=cls))


@core_node(
    display_name="Batch Images",
    category="image/batch",
    inputs=[io.Image.Input("image1"), io.Image.Input("image2")],
    outputs=[io.Image.Output()],
    is_deprecated=True,
)
def ImageBatch(image1: Tensor, image2: Tensor):
    """Both batches in one; the second is cut and resized to the first's size."""
    channels = max(image1.shape[-1], image2.shape[-1])
    first, second = (_opaque(i, channels) for i in (image1, image2))
    if first.shape[1:] != second.shape[1:]:
        second = _centred(second, first.shape[1], first.shape[2])
    return io.NodeOutput(torch.cat([first, second]))


@core_node(
    display_name="Stitch Images",
    category="image/transform",
    inputs=[
        io.Image.Input("image1"),
        io.Combo.Input("direction", options=["right", "down", "left", "up"], default="right"),
        io.Boolean.Input("match_image_size", default=True),
        io.Int.Input("spacing_width", default=0, min=0, max=1024, step=2, advanced=True),
        io.Combo.Input("spacing_color", options=list(_COLOURS), default="white", advanced=True),
        io.Image.Input("image2", optional=True),
    ],
    outputs=[io.Image.Output()],
)
def ImageStitch(image1, direction, match_image_size, spacing_width, spacing_color, image2=None):
    """Both batches as one picture each, side by side or one above the other."""
    if image2 is None:
        return io.NodeOutput(image1)
    channels = max(image1.shape[-1], image2.shape[-1])
    first, second = (_opaque(i, channels) for i in (image1, image2))
    # The shorter batch repeats its last picture.
    count, beside = max(len(first), len(second)), direction in ("right", "left")
    first, second = (torch.cat([i, i[-1:].repeat(count - len(i), 1, 1, 1)]) for i in (first, second))
    across = 1 if beside else 2  # the dimension in which both must be alike
    if first.shape[across] != second.shape[across]:
        raise UsageError(
            f"image1 is {tuple(first.shape[1:3])} and image2 {tuple(second.shape[1:3])} high and wide; without "
            "ComfyUI only pictures that fit are stitched: make them of one size"
        )
    if match_image_size:
        # ComfyUI resizes by way of bytes, also where nothing changes.
        second = (second * 255).byte().float() / 255
    parts = [first, second] if direction in ("right", "down") else [second, first]
    if spacing_width:
        shape = list(first.shape)
        shape[2 if beside else 1] = spacing_width
        gap = torch.ones(shape)
        gap[..., :3] = torch.tensor(_COLOURS[spacing_color])
        parts.insert(1, gap)
    return io.NodeOutput(torch.cat(parts, 2 if beside else 1))


def _opaque(image: Tensor, channels: int) -> Tensor:
    """IMAGE with an alpha channel of ones where one is wanted."""
    return torch.nn.functional.pad(image, (0, channels - image.shape[-1]), value=1.0)


def _centred(image: Tensor, height: int, width: int) -> Tensor:
    """IMAGE cut about its centre to the wanted shape of side lengths, then resized."""
    h, w = image.shape[1:3]
    wanted = width / height
    x = round((w - w * wanted / (w / h)) / 2) if w / h > wanted else 0
    y = round((h - h * (w / h) / wanted) / 2) if w / h < wanted else 0
    part = image[:, y : h - y, x : w - x].movedim(-1, 1)
    return torch.nn.functional.interpolate(part, size=(height, width), mode="bilinear").movedim(1, -1)


NODES = [LoadImage, SaveImage, PreviewImage, ImageBatch, ImageStitch]
