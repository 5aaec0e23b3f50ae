"""Images in and out: IMAGE and MASK tensors, PNG files that carry their workflow, no file half written."""

from __future__ import annotations

import io
import json
import os
import re
import time
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UsageError
from .folder import Inside, alone
from .paths import inside

# ComfyUI stores the API-format prompt and the UI-format workflow under these names.
KEYS = ("prompt", "workflow")
_PNG = b"\x89PNG\r\n\x1a\n"
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"IDAT", b"IEND")
_ANIMATIONS = ("GIF", "PNG", "WEBP", "AVIF")
_MOST_PIXELS = 2**28
# What people take for pictures and Pillow does not open, by how it begins.
_OTHERS = {
    b"%PDF": "a PDF file", b"<svg": "an SVG drawing", b"<?xml": "an SVG drawing", b"<": "a web page",
    b"{": "a JSON file",
}  # fmt: skip
_EXIF_IFD, _USER_COMMENT = 0x8769, 0x9286


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
    alone(path).write(_png(image, text, compress_level), synced=False)


def _png(image: Tensor, text: dict[str, Any] | None, compress_level: int) -> bytes:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in (text or {}).items():
        if value is not None:
            info.add_text(key, json.dumps(value))
    made = io.BytesIO()
    to_pil(image).save(made, "PNG", pnginfo=info, compress_level=compress_level)
    return made.getvalue()


def save_images(
    images: Tensor, prefix: str, folder: Path, text: dict[str, Any] | None = None, compress_level: int = 4
) -> list[Path]:
    """Save IMAGE (B, H, W, C) as PREFIX_00001_.png and on, after the highest number that is there; ComfyUI's naming.

    Nothing is written over: of two processes that save at once each picture takes a number of its own.
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
    number, saved = max(numbers, default=0) + 1, []
    for i, image in enumerate(images):
        stem = target.name.replace("%batch_num%", str(i))
        names = (f"{stem}_{each:05}_.png" for each in count(number))
        made = Inside(target.parent).write_first(names, _png(image, text, compress_level), synced=False)
        assert made is not None
        saved.append(made.path)
        number = int(made.name.removeprefix(f"{stem}_").removesuffix("_.png")) + 1
    return saved


def load_image(path: Path) -> tuple[Tensor, Tensor]:
    """IMAGE (B, H, W, 3) and MASK (B, H, W), 1 where the image is transparent; frames of an animation are a batch.

    A file without transparency has a zero mask of 64 x 64, as in ComfyUI. Raises UsageError for what is no image.
    """
    try:
        colours, alpha = decode(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not an image that can be read ({error}); save it again as PNG") from error
    return colours, torch.zeros(len(colours), 64, 64) if alpha is None else 1.0 - alpha


def decode(
    data: bytes, formats: tuple[str, ...] | None = None, most_pixels: int = _MOST_PIXELS
) -> tuple[Tensor, Tensor | None]:
    """A picture as a viewer shows it: colours (B, H, W, 3) and alpha (B, H, W), or None where all is opaque, in [0, 1].

    It is turned as its orientation tag says. The frames of a GIF, PNG, WebP or AVIF animation are a batch; of files
    that hold several pictures for other reasons (previews and depth maps of a phone, pages of a TIFF, sizes of an icon)
    the first counts, which viewers show. Colours under full transparency are those of the file.

    formats: names of Pillow's formats that may be read, by default all. Raises ValueError for whatever cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        try:
            frames = _frames(Image.open(io.BytesIO(data), formats=formats), most_pixels)
        except ValueError:
            if not data.startswith(_PNG):
                raise
            # Texts and profiles beyond Pillow's bounds are not needed to see the picture.
            frames = _frames(Image.open(io.BytesIO(_bare_png(data)), formats=formats), most_pixels)
        pairs = [_numbers(frame) for frame in frames]
    except UnidentifiedImageError as error:
        raise ValueError(_strange(data, formats)) from error
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads to
        raise ValueError(str(error) or type(error).__name__) from error
    colours = torch.stack([colour for colour, _ in pairs])
    if all(alpha is None for _, alpha in pairs):
        return colours, None
    return colours, torch.stack([torch.ones(colours.shape[1:3]) if alpha is None else alpha for _, alpha in pairs])


def decode_opaque(data: bytes, formats: tuple[str, ...] | None = None, most_pixels: int = _MOST_PIXELS) -> Tensor:
    """A picture (H, W, 3) in [0, 1] without transparency: the first frame, on white, where viewers put it too.

    Arguments and errors: see `decode`.
    """
    colours, alpha = decode(data, formats, most_pixels)
    if alpha is None:
        return colours[0]
    cover = alpha[0].unsqueeze(-1)
    return colours[0] * cover + (1.0 - cover)


def _strange(data: bytes, formats: tuple[str, ...] | None) -> str:
    """What a file is that none of Pillow's readers takes, or none of those that are asked."""
    if not data:
        return "it is empty"
    if data[4:8] == b"ftyp":
        return "it is of the kind of HEIC and MP4"
    kind = next((kind for start, kind in _OTHERS.items() if data.lstrip().startswith(start)), None)
    if kind is not None:
        return f"it is {kind}"
    return f"it is damaged, or no {' or '.join(formats) if formats else 'kind of picture that Pillow knows'}"


def _frames(file: Any, most_pixels: int) -> list[Any]:
    """The frames that a viewer shows, upright and of one size, and the file closed."""
    from PIL import ImageSequence

    with file:
        if file.format == "EPS":
            raise ValueError("it is an EPS drawing, which is a program that another one would have to run")
        if file.width * file.height > most_pixels:
            raise ValueError(f"it has {file.width} x {file.height} pixels, more than {most_pixels}")
        animated = file.format in _ANIMATIONS and getattr(file, "is_animated", False)
        frames = [_upright(frame.copy()) for frame in ImageSequence.Iterator(file)] if animated else [_upright(file)]
        if animated and file.info.get("default_image") and len(frames) > 1:
            del frames[0]  # shown by viewers that know no animated PNG
    return [frame for frame in frames if frame.size == frames[0].size]


def _upright(frame: Any) -> Any:
    from PIL import ImageOps

    frame.load()
    try:
        return ImageOps.exif_transpose(frame)
    except Exception:  # tags that are no tags: nothing says how to turn it
        return frame.copy()


def _numbers(frame: Any) -> tuple[Tensor, Tensor | None]:
    """Colours (H, W, 3) and alpha (H, W) of one Pillow image in whichever mode."""
    import numpy as np
    from PIL import Image, ImageCms

    if frame.mode == "F" or frame.mode.startswith("I"):
        grey = torch.from_numpy(np.asarray(frame).astype(np.float32))
        top = 65535.0 if frame.mode != "F" else 1.0
        # Whole numbers of 32 bits, and floats that are not 0 .. 1, have no white of their own.
        grey = grey / max(top, float(grey.nan_to_num(0.0, posinf=0.0).amax()))
        return grey.nan_to_num(0.0).clamp(0, 1).unsqueeze(-1).repeat(1, 1, 3), None
    if frame.mode == "LAB":
        to_rgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        frame = ImageCms.applyTransform(frame, to_rgb) or frame

    def tensor(picture: Image.Image) -> Tensor:
        return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255.0)

    if not frame.has_transparency_data:
        return tensor(frame.convert("RGB")), None
    return tensor(frame.convert("RGB")), tensor(frame.convert("RGBA").getchannel("A"))


def _bare_png(data: bytes) -> bytes:
    """A PNG with the chunks that its pixels need, their transparency, orientation and animation, and no others."""
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        if kind in _PIXEL_CHUNKS:
            parts.append(data[at : at + 12 + length])
        at += 12 + length
    return b"".join(parts)


def read_texts(path: Path) -> dict[str, str]:
    """The texts that a picture of ComfyUI carries under KEYS.

    They stand in a PNG's texts, or in the EXIF data of a WebP, JPEG or AVIF. Raises UsageError for what is no picture.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            if file.format == "PNG" and not any(key in file.info for key in KEYS):
                file.load()  # texts may also stand behind the pixels
            found = {key: file.info[key] for key in KEYS if isinstance(file.info.get(key), str)}
            return found or _exif_texts(file)
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads to
        raise UsageError(f"{path} is not a picture that can be read ({error}); save it again from ComfyUI") from error


def other_texts(path: Path) -> str | None:
    """Which other program's generation data a picture carries, or None."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            parameters = file.info.get("parameters")
            comment = file.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    except Exception:
        return None
    if isinstance(comment, bytes):
        comment = comment[8:].decode("utf-16-be" if comment.startswith(b"UNICODE") else "utf-8", "replace")
    texts = [text for text in (parameters, comment) if isinstance(text, str)]
    return "AUTOMATIC1111" if any("Steps: " in text for text in texts) else None


def _exif_texts(file: Any) -> dict[str, str]:
    """Texts of EXIF tags that begin with a key and a colon, as ComfyUI writes them into a WebP."""
    exif = file.getexif()
    values = [*exif.values(), *exif.get_ifd(_EXIF_IFD).values()]
    found: dict[str, str] = {}
    for value in values:
        if isinstance(value, bytes):
            value = value.removeprefix(b"ASCII\0\0\0").removeprefix(b"UNICODE\0").decode("utf-8", "replace")
        key, colon, text = value.partition(":") if isinstance(value, str) else ("", "", "")
        if colon and key.strip().lower() in KEYS:
            found.setdefault(key.strip().lower(), text.strip("\0 "))
    return found
