"""`comfy_api.latest.ui` without ComfyUI: what a node shows beside its outputs; here, files in the output folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ...files import pictures as images
from ...hosts.headless import folders
from .inputs import FolderType
from .schema import ComfyNode


class SavedResult(dict):
    """A file that was written, as the UI is told of it."""

    def __init__(self, filename: str, subfolder: str, type: FolderType):
        super().__init__(filename=filename, subfolder=subfolder, type=type.value)


class SavedImages:
    """Images that were written."""

    def __init__(self, results: list[SavedResult], is_animated: bool = False):
        self.results, self.is_animated = results, is_animated

    def as_dict(self) -> dict[str, Any]:
        """What the UI receives."""
        return {"images": self.results, **({"animated": (True,)} if self.is_animated else {})}


class ImageSaveHelper:
    """Writes IMAGE batches as PNG files that carry the node's prompt and workflow."""

    @staticmethod
    def save_images(
        images_batch: Tensor,
        filename_prefix: str,
        folder_type: FolderType,
        cls: type[ComfyNode] | None,
        compress_level: int = 4,
    ) -> list[SavedResult]:
        """Save every image of the batch; previews go to the folder `preview` inside the output folder."""
        root = _root(folder_type)
        text = None
        if cls is not None:
            text = {"prompt": cls.hidden.prompt, **(cls.hidden.extra_pnginfo or {})}
        paths = images.save_images(images_batch, filename_prefix, root, text, compress_level)
        return [SavedResult(p.name, _subfolder(p, root), folder_type) for p in paths]

    @staticmethod
    def get_save_images_ui(
        images: Tensor, filename_prefix: str, cls: type[ComfyNode] | None, compress_level: int = 4
    ) -> SavedImages:
        """Save every image of the batch and return what the UI shows."""
        return SavedImages(ImageSaveHelper.save_images(images, filename_prefix, FolderType.output, cls, compress_level))


class PreviewImage:
    """Images to look at."""

    def __init__(self, image: Tensor, animated: bool = False, cls: type[ComfyNode] | None = None, **kwargs):
        self.values = ImageSaveHelper.save_images(image, "preview", FolderType.temp, cls, compress_level=1)
        self.animated = animated

    def as_dict(self) -> dict[str, Any]:
        """What the UI receives."""
        return {"images": self.values, "animated": (self.animated,)}


class PreviewMask(PreviewImage):
    """A mask (B, H, W) to look at."""

    def __init__(self, mask: Tensor, animated: bool = False, cls: type[ComfyNode] | None = None, **kwargs):
        super().__init__(mask.reshape(-1, *mask.shape[-2:], 1).expand(-1, -1, -1, 3), animated, cls, **kwargs)


class PreviewText:
    """A text to read; the command line prints it."""

    def __init__(self, value: str, **kwargs):
        self.value = value

    def as_dict(self) -> dict[str, Any]:
        """What the UI receives."""
        return {"text": (self.value,)}


def saved_path(result: dict) -> Path:
    """The file of a SavedResult."""
    return _root(FolderType(result["type"])) / result["subfolder"] / result["filename"]


def _root(folder_type: FolderType) -> Path:
    out = folders.current().output
    return out / "preview" if folder_type == FolderType.temp else out


def _subfolder(path: Path, root: Path) -> str:
    relative = path.parent.relative_to(root).as_posix()
    return "" if relative == "." else relative


__all__ = ["ImageSaveHelper", "PreviewImage", "PreviewMask", "PreviewText", "SavedImages", "SavedResult", "saved_path"]
