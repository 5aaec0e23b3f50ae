"""Combos of files: their choices are what lies in the run's folders, their errors say where a missing file belongs."""

from __future__ import annotations

from ..hosts.headless import folders
from .api.inputs import ComboInput, UploadType


class FileInput(ComboInput):
    """A combo whose choices are files."""

    io_type = "COMBO"

    def check(self, name: str) -> str:
        """The name, with forward slashes, when the file is there. Raises UsageError otherwise."""
        raise NotImplementedError


class ModelFile(FileInput):
    """A safetensors file of one of `folders.KINDS`."""

    def __init__(self, id: str, kind: str, **kwargs):
        super().__init__(id, folders.current().names(kind), **kwargs)
        self.kind = kind

    def check(self, name: str) -> str:
        """See FileInput."""
        name = name.replace("\\", "/")  # as saved on Windows
        folders.current().model(self.kind, name)
        return name


class ImageFile(FileInput):
    """An image of the run's input folders."""

    def __init__(self, id: str, **kwargs):
        super().__init__(id, folders.current().images(), upload=UploadType.image, **kwargs)

    def check(self, name: str) -> str:
        """See FileInput."""
        name = name.replace("\\", "/")
        folders.current().image(name)
        return name
