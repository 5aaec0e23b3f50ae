"""Gaussian statistics of latents: the files that hold them, and the folders of pictures that they are taken from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..files import pictures as images
from ..files import weights as files
from ..files.atomic import tensors, write_new
from ..files.paths import below, dead_link, files_below
from ..sampling.teleport import Statistics, read
from .contract import VAE, Host

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LATENTS = (".latent", ".safetensors")
# What SaveLatent calls its tensor, and marks files with that are in the VAE's own scale.
_TENSOR, _VERSION, _OLD_SCALE = "latent_tensor", "latent_format_version_0", 0.18215
_MOST_FILES = 10_000
_MOST_NUMBERS = 2**31


def names(roots: Sequence[Path]) -> list[str]:
    """Every file of statistics below the roots."""
    return files_below(roots, (".safetensors",))


def load(roots: Sequence[Path], name: str) -> Statistics:
    """Statistics by file name; ValueError for a name that leaves its folder, and for a file that holds others."""
    for root in roots:
        path = below(root, name)
        if path.is_file():
            break
    else:
        if dead := dead_link(roots, name):
            raise ValueError(f"statistics {name!r}: {dead}")
        raise ValueError(
            f"statistics {name!r} are not in {' or '.join(str(root) for root in roots)}; put the file there, or make "
            f"one with Gaussian Statistics. Found there: {', '.join(names(roots)[:8]) or 'nothing'}"
        )
    # The header alone: a checkpoint that strayed here is not read whole to be refused.
    shapes = files.shapes(path)
    if sum(torch.Size(shape).numel() for shape in shapes.values()) > _MOST_NUMBERS or len(shapes) > 4:
        raise ValueError(f"{path} holds {len(shapes)} tensors, and no Gaussian statistics: choose another file")
    try:
        return read(files.load(path))
    except ValueError as error:
        raise ValueError(f"{path} holds no Gaussian statistics: {error}") from error


def save(folder: Path, name: str, statistics: Statistics) -> Path:
    """Write statistics under a name that nothing has yet; ValueError for one that would leave the folder."""
    return write_new(folder, name, tensors(statistics.state()))


def stored_latents(host: Host, roots: Sequence[Path], folder: str, vae: VAE, size: tuple[int, int]) -> list[Tensor]:
    """LATENT samples (1, C, ...) of every picture and every saved latent in a folder, sorted by name.

    size: (width, height) in pixels that pictures are cut to. ValueError names a folder or file that cannot be read.
    """
    where = next((path for path in (below(root, folder) for root in roots) if path.is_dir()), None)
    if where is None:
        raise ValueError(
            f"folder {folder!r} is not in {' or '.join(map(str, roots))}: make it there, or clear the name"
        )
    found = [path for path in sorted(where.iterdir()) if path.suffix.lower() in (*PICTURES, *LATENTS)]
    if not 0 < len(found) <= _MOST_FILES:
        raise ValueError(f"folder {where} holds {len(found)} pictures and latents; 1 to {_MOST_FILES} are needed")
    return list(_read(host, found, vae, size))


def _read(host: Host, found: list[Path], vae: VAE, size: tuple[int, int]) -> Iterator[Tensor]:
    for path in found:
        host.check_cancelled()
        if path.suffix.lower() in LATENTS:
            shapes = files.shapes(path)
            if _TENSOR not in shapes:
                raise ValueError(f"{path} is no latent that Save Latent wrote: it has no {_TENSOR}")
            samples = files.load(path, _TENSOR)[""].float()
            yield samples if _VERSION in shapes else samples / _OLD_SCALE
        elif vae is None:
            raise ValueError(f"folder {path.parent} holds pictures, which a VAE encodes: connect `vae`")
        else:
            yield host.encode_images(vae, _cut(images.load_image(path)[0], *size))["samples"].cpu()


def _cut(image: Tensor, width: int, height: int) -> Tensor:
    """The middle of an IMAGE (1, H, W, 3), scaled so that it fills (1, height, width, 3)."""
    pixels = image.movedim(-1, 1)
    scale = max(width / pixels.shape[3], height / pixels.shape[2])
    sides = [max(height, round(pixels.shape[2] * scale)), max(width, round(pixels.shape[3] * scale))]
    if sides != list(pixels.shape[2:]):
        pixels = torch.nn.functional.interpolate(pixels, size=sides, mode="bilinear", antialias=True)
    top, left = (sides[0] - height) // 2, (sides[1] - width) // 2
    return pixels[:, :, top : top + height, left : left + width].movedim(1, -1)
