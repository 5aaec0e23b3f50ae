"""Images in and out: IMAGE and MASK tensors, PNG files that carry their workflow, no file half written."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UsageError
from .paths import inside

# ComfyUI stores the API-format prompt and the UI-format workflow under these names.
KEYS = ("prompt", "workflow")


def to_pil(image: Tensor):
    """One image (H, W, C) in [0, 1], cut to that range, as a Pillow image; truncated like ComfyUI's, not rounded."""
    from PIL import Image

    pixels = (255.0 * image.detach().float().cpu()).clamp(0, 255).to(torch.uint8).numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def rounded(images: Tensor) -> Tensor:
    """The first three channels of pictures (..., H, W, C) in [0, 1], cut to that range, as uint8 on the CPU."""
    return (images[..., :3].detach().float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def as_image(picture) -> Tensor:
    """A Pillow image in RGB as IMAGE (1, H, W, 3) in [0, 1]."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(1, picture.height, picture.width, 3).float() / 255


def save_png(image: Tensor, path: Path, text: dict[str, Any] | None = None, compress_level: int = 4) -> None:
    """Write one image with JSON texts; a reader sees the whole file or none."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (text or {}).items():
        if value is not None:
            info.add_text(key, json.dumps(value))
    picture = to_pil(image)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            picture.save(file, "PNG", pnginfo=info, compress_level=compress_level)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_images(
    images: Tensor, prefix: str, folder: Path, text: dict[str, Any] | None = None, compress_level: int = 4
) -> list[Path]:
    """Save IMAGE (B, H, W, C) as PREFIX_00001_.png and on, after the highest number that is there; ComfyUI's naming.

    The prefix may name subfolders and hold %width%, %height%, %year%, %month%, %day%, %hour%, %minute%, %second% and
    %batch_num%. Raises UsageError for a prefix that leaves the folder.
    """
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise UsageError(
            f"IMAGE of shape {tuple(images.shape)} cannot be saved; (B, H, W, 1, 3 or 4 channels) is needed"
        )
    now = time.localtime()
    fields = {"year": f"{now.tm_year}", "month": f"{now.tm_mon:02}", "day": f"{now.tm_mday:02}",
              "hour": f"{now.tm_hour:02}", "minute": f"{now.tm_min:02}", "second": f"{now.tm_sec:02}",
              "width": str(images.shape[2]), "height": str(images.shape[1])}  # fmt: skip
    for name, value in fields.items():
        prefix = prefix.replace(f"%{name}%", value)
    if prefix.endswith(("/", "\\")):
        raise UsageError(f"the file name prefix {prefix!r} ends in a folder; add a name")
    target = inside(folder, prefix)
    target.parent.mkdir(parents=True, exist_ok=True)
    taken = re.compile(re.escape(target.name) + r"_(\d+)(?!\d)", re.IGNORECASE if os.name == "nt" else 0)
    numbers = [int(m[1]) for m in map(taken.match, os.listdir(target.parent)) if m]
    first = max(numbers, default=0) + 1
    saved = []
    for i, image in enumerate(images):
        path = target.parent / f"{target.name.replace('%batch_num%', str(i))}_{first + i:05}_.png"
        save_png(image, path, text, compress_level)
        saved.append(path)
    return saved


def load_image(path: Path) -> tuple[Tensor, Tensor]:
    """IMAGE (B, H, W, 3) and MASK (B, H, W), 1 where the image is transparent; frames of a GIF are a batch.

    A file without transparency has a zero mask of 64 x 64, as in ComfyUI. Raises UsageError for what is no image.
    """
    import numpy as np
    from PIL import Image, ImageOps, ImageSequence

    try:
        with Image.open(path) as file:
            frames = [ImageOps.exif_transpose(frame.copy()) for frame in ImageSequence.Iterator(file)]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} is not an image that can be read ({error}); save it again as PNG") from error
    frames = [f for f in frames if f.size == frames[0].size]

    def tensor(frame) -> Tensor:
        return torch.from_numpy(np.asarray(frame, dtype=np.float32) / 255.0)

    colours = torch.stack([tensor(f.convert("RGB")) for f in frames])
    if any(f.has_transparency_data for f in frames):
        return colours, torch.stack([1.0 - tensor(f.convert("RGBA").getchannel("A")) for f in frames])
    return colours, torch.zeros(len(frames), 64, 64)


def read_texts(path: Path) -> dict[str, str]:
    """The texts that a PNG carries under KEYS. Raises UsageError for what is no PNG."""
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as file:
            if not any(key in file.info for key in KEYS):
                file.load()  # texts may also stand behind the pixels
            return {key: file.info[key] for key in KEYS if isinstance(file.info.get(key), str)}
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} is not a PNG that can be read ({error}); save it again from ComfyUI") from error
