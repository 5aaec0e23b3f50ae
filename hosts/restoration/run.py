"""Restores pictures of any size with a one-step model, tile by tile, the same on every host.

`run(host, ...)` serves the node; `host` is a `hosts.contract.Host`. Pictures are enlarged, encoded, decoded and
blended a tile at a time, in rounds of tiles, so that beside the pictures that come in and go out memory is the tiles'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...restoration.captions import per_image, per_tile
from ...restoration.color_fix import Method as ColourFix
from ...restoration.color_fix import color_fix
from ...restoration.hidden import filled
from ...restoration.one_step import MOST_AGAIN, SLOPES, OneStep, slope
from ...restoration.resize import enlarged, region, source_box
from ...restoration.tiles import Grid, Tiling
from ...sampling.settings import Settings, setting
from ..contract import CLIP, MODEL, VAE, Host
from ..methods import Restore

# Sides that every VAE and every patch size divides; InstaRevive's too.
MULTIPLE = 64
# Tiles between one change of network and the next: many are quick, and few take little memory.
ROUND = 64
# Pictures of which one tile is held at once; a video model needs all its frames.
PICTURES = 16


@dataclass(frozen=True)
class Size(Settings):
    """How a picture is enlarged and cut. least_side: the least that the shorter side is worked on at; 0: as it is."""

    scale: float = setting(4.0, 0.1, 16, step=0.1, round=0.001, remedy="1 restores at the same size",
        help="Sides of the result over those of the image; 1 restores at the same size.")
    tiling: Tiling = field(default_factory=Tiling)
    least_side: int = setting(0, 0, 8192, step=64, advanced=True, remedy="0 leaves the side as it is",
        help="The shorter side is worked on at no less than this, then made smaller; 512 is InstaRevive's, 0 off.")

    def grid(self, height: int, width: int) -> Grid:
        """The tiles of a picture of this size."""
        return Grid(*enlarged(height, width, self.scale, self.least_side), self.tiling)


@dataclass(frozen=True, eq=False)
class RestorationRequest(Settings):
    """How to restore.

    caption, tile_captions: texts for `restoration.captions`, the latter empty where tiles have none of their own.
    tile_strength: share of the tile's caption against the image's. latent_scale: what raw latents of the VAE are
    multiplied by for the network, 0 for the model's own. mask: (B or 1, h, w), 1 where to restore.
    """

    size: Size
    caption: str = ""
    tile_captions: str = ""
    tile_strength: float = setting(1.0, 0, 1, step=0.05, remedy="1 is the tile's own caption alone",
        help="Share of a tile's own caption. Between 0 and 1 both captions run, mixed: two calls.",
        page="Share of a tile's own caption: 0 is the caption alone, 1 the tile's alone. Between, both are run and the "
        "results mixed.")
    colour_fix: ColourFix = setting("wavelet",
        help="Colours of the input. wavelet: its coarse part. adain: mean, contrast. none: the model's.",
        page="Colours of the input. wavelet: what is coarser than about 30 pixels. adain: mean and contrast of each "
        "channel. none: the model's own. In tiles, each is done in each tile.")
    one_step: OneStep = field(default_factory=OneStep)
    latent_scale: float = setting(0.0, 0, 10, step=0.00001, round=0.00001, advanced=True, remedy="0 is the model's own",
        help="Factor of the VAE's latents; 0: the model's own. ComfyUI needs 0.18215 for InstaRevive.",
        page="Factor of the VAE's latents on their way into the model. 0 takes the model's own; see below.")
    batch_size: int = setting(4, 1, 256, advanced=True, remedy="4 is usual",
        help="Tiles at once; changes memory, not the result.",
        page="Tiles that are encoded, restored and decoded at once.")
    caption_per_line: bool = setting(False, advanced=True,
        help="Each line of caption belongs to one image, instead of the whole text to all.",
        page="Each line of `caption` belongs to one image of the batch.")
    mask: Tensor | None = None
    feather: int = setting(8, 0, 512, advanced=True, remedy="0 is a sharp edge",
        help="Pixels of the mask, to either side, over which its edge is softened.",
        page="Pixels, of the mask, over which its edge fades to either side.")


def pictures(images: Tensor, name: str = "image") -> Tensor:
    """IMAGE of 3 or 4 channels; grey ones become three, colours under alpha 0 are `filled`. ValueError for others."""
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4) or 0 in images.shape:
        raise ValueError(
            f"{name} has shape {tuple(images.shape)}: an IMAGE is (pictures, height, width, channels) with 1, 3 or 4 "
            "channels, none of them 0"
        )
    return images.expand(-1, -1, -1, 3) if images.shape[-1] == 1 else filled(images)


def tiles_of(images: Tensor, size: Size) -> Iterator[Tensor]:
    """What each tile shows of images (B, H, W, C), row by row, at the pictures' own size: (B, h, w, C)."""
    grid = size.grid(*images.shape[1:3])
    for box in grid.boxes:
        top, bottom, left, right = source_box((images.shape[1], images.shape[2]), (grid.height, grid.width), box)
        yield images[:, top:bottom, left:right]


def run(host: Host, model: MODEL, clip: CLIP, vae: VAE, images: Tensor, request: RestorationRequest) -> Tensor:
    """IMAGE (B, ceil(H scale), ceil(W scale), 3, or 4 where there is an alpha), fp32 on the CPU.

    A mask leaves the rest as the plain enlargement. ValueError for what does not fit.
    """
    images = pictures(images)
    grid = request.size.grid(*images.shape[1:3])
    captions = per_image(request.caption, len(images), request.caption_per_line)
    own = per_tile(request.tile_captions, len(images), len(grid)) if request.tile_captions.strip() else None
    mask = None if request.mask is None else softened(request.mask, len(images), request.feather)
    if mask is not None:
        if not bool(mask.any()):
            host.say(
                "the mask is empty, so nothing is restored and the picture is only enlarged: paint what is to be "
                "restored, or disconnect `mask`",
                warn=True,
            )
        mask = mask.expand(len(images), -1, -1, -1)
    canvas = torch.zeros(len(images), grid.height, grid.width, images.shape[-1])
    use = _Networks(host, model, clip, vae, request)
    count = len(images) if use.video else PICTURES
    bar, done = host.progress(3 * len(grid) * len(images)), 0
    for first in range(0, len(images), count):
        some = slice(first, first + count)
        part = None if mask is None else mask[some]
        job = _Job(use, images[some], grid, part, captions[some], None if own is None else own[some])
        for work, tile in job.tiles():
            host.check_cancelled()
            done += work
            bar.step(done)
            if tile is not None:
                grid.add(canvas[some], *tile)
    wanted = enlarged(images.shape[1], images.shape[2], request.size.scale)
    if wanted != (grid.height, grid.width):
        canvas = region(canvas, wanted)
    return canvas.clamp_(0, 1)


def softened(mask: Tensor, count: int, feather: int) -> Tensor:
    """MASK (h, w), (1, h, w) or (B, h, w) as (B or 1, h, w, 1), its edge spread `feather` pixels to either side."""
    mask = mask.reshape(-1, *mask.shape[-2:]).float().clamp(0, 1)
    if len(mask) not in (1, count):
        raise ValueError(f"mask holds {len(mask)} masks for {count} images: give one for all, or one for each")
    x = mask[:, None]
    if feather:
        # Two means over a window make a triangle, whose reach is the window less one.
        for dim in (2, 3):
            kernel = x.new_full((1, 1, *((feather + 1, 1) if dim == 2 else (1, feather + 1))), 1 / (feather + 1))
            pad = (0, 0, feather, feather) if dim == 2 else (feather, feather, 0, 0)
            x = F.conv2d(F.conv2d(F.pad(x, pad, mode="replicate"), kernel), kernel)
    return x.movedim(1, -1).clamp(0, 1)


class _Networks:
    """What turns latents of degraded pictures into those of restored ones."""

    def __init__(self, host: Host, model: MODEL, clip: CLIP, vae: VAE, request: RestorationRequest):
        self.host, self.model, self.clip, self.vae, self.request = host, model, clip, vae, request
        self.video = host.latent_format(model)[1] == 3
        self._sigmas = request.one_step.sigmas(host.schedule(model), host.noise_path(model))
        self._sampler = host.method_sampler(Restore())
        self._factor = _factor(host, model, request.latent_scale)
        self._guiders: dict[str, Any] = {}
        self._watched = False

    def restored(self, latents: Tensor, whole: str, own: str) -> Tensor:
        """x0 of latents (B, C, ...), as they are stored. Where the tile has a caption of its own, both are mixed."""
        share = 1.0 if whole == own else self.request.tile_strength
        if share in (0, 1):
            return self._sampled(latents, own if share else whole)
        return torch.lerp(self._sampled(latents, whole), self._sampled(latents, own), share)

    def _sampled(self, latents: Tensor, text: str) -> Tensor:
        host = self.host
        if text not in self._guiders:
            self._guiders[text] = host.cfg_guider(self.model, host.encode_text(self.clip, text), None, 1.0)
        scaled = latents * self._factor
        x0 = self._once(scaled, text)
        if not self._watched:
            self._watched = True
            self._watch(scaled, x0, text)
        return x0 / self._factor

    def _once(self, latents: Tensor, text: str) -> Tensor:
        """x0 of latents as the model stores them."""
        return self.host.sample(self._guiders[text], self._sampler, self._sigmas, {"samples": latents}, 0).float().cpu()

    def _watch(self, given: Tensor, made: Tensor, text: str) -> None:
        """Warn of a model that is no restorer, going by what it made of its first latents."""
        found, most = self._slope(given, made), SLOPES[1]
        if found > most:
            # Sharpening what is blurred enlarges it, too; what is restored already a restorer leaves as it is.
            found, most = self._slope(made, self._once(made, text)), MOST_AGAIN
        if not SLOPES[0] <= found <= most:
            self.host.say(
                f"the model makes latents {found:.2f} times what they were, which restoration does not: it may be a "
                "model for many steps, or one for another timestep; load a one-step restorer, or its LoRA",
                warn=True,
            )

    def _slope(self, given: Tensor, made: Tensor) -> float:
        return slope(*(self.host.latents_in(self.model, x) for x in (given, made)))

    def encoded(self, pixels: Tensor) -> Tensor:
        """Stored latents (B, C, h, w), or (1, C, T, h, w) of a video, of pixels (B, h, w, 3) of any size."""
        down, across = (-pixels.shape[dim] % MULTIPLE for dim in (1, 2))
        # Repeated pixels, not black ones: a dark frame would darken what lies next to it.
        padded = F.pad(pixels.movedim(-1, 1), (0, across, 0, down), mode="replicate").movedim(1, -1).clamp(0, 1)
        many = [padded] if self.video else padded.split(self.request.batch_size)
        return torch.cat([self.host.encode_images(self.vae, part)["samples"].float().cpu() for part in many])

    def decoded(self, latents: Tensor, plain: Tensor) -> Tensor:
        """The tile (B, h, w, C) in the colours of the plain one, whose alpha it has."""
        height, width = plain.shape[1:3]
        many = [latents] if self.video else latents.split(self.request.batch_size)
        tile = torch.cat([self.host.decode(self.vae, part)[:, :height, :width, :3] for part in many])
        if len(tile) < len(plain):
            raise ValueError(
                f"the video model gave {len(tile)} frames of {len(plain)}: give it as many as its VAE takes, such as "
                "4 n + 1"
            )
        fixed = color_fix(tile[: len(plain)], plain[..., :3], self.request.colour_fix)
        return torch.cat([fixed, plain[..., 3:]], -1)


class _Job:
    """Some of the pictures, tile by tile. captions, own: theirs, and those of their tiles ([picture][tile]) or None."""

    def __init__(
        self, use: _Networks, images: Tensor, grid: Grid, mask: Tensor | None, captions: Sequence[str],
        own: Sequence[Sequence[str]] | None,
    ):  # fmt: skip
        self.use, self.images, self.grid, self.mask = use, images, grid, mask
        self.captions, self.own = captions, own

    def tiles(self) -> Iterator[tuple[int, tuple[int, Tensor] | None]]:
        """(steps done, finished (index, tile (B, h, w, C)) or None), three steps for each tile of each picture."""
        asked = []
        for index in range(len(self.grid)):
            if self.mask is not None and not bool(torch.count_nonzero(self._share(index))):
                yield 3 * len(self.images), (index, self._plain(index))
            else:
                asked.append(index)
        size = max(1, ROUND // len(self.images))
        for begin in range(0, len(asked), size):
            yield from self._round(asked[begin : begin + size])

    def _round(self, asked: Sequence[int]) -> Iterator[tuple[int, tuple[int, Tensor] | None]]:
        """Every network once: the VAE, the restorer, and the VAE again."""
        use, frames = self.use, len(self.images)
        latents: dict[int, Tensor] = {}
        for index in asked:
            latents[index] = use.encoded(self._plain(index)[..., :3])
            yield frames, None
        for places, whole, own in self._groups(asked):
            z = use.restored(torch.stack([latents[index][row] for index, row in places]), whole, own)
            for (index, row), x0 in zip(places, z, strict=True):
                latents[index][row] = x0
            yield len(places) * (frames if use.video else 1), None
        for index in asked:
            plain = self._plain(index)
            tile = use.decoded(latents.pop(index), plain)
            if self.mask is not None:
                tile = torch.lerp(plain, tile, self._share(index))
            yield frames, (index, tile)

    def _groups(self, asked: Sequence[int]) -> Iterator[tuple[list[tuple[int, int]], str, str]]:
        """Latents ((tile, row), ...) that go through the network together, with their captions."""
        same: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for index in asked:
            for row in range(1 if self.use.video else len(self.images)):
                whole = self.captions[row]
                # A tile of which nothing is said is described by the picture's caption.
                own = self.own[row][index] if self.own is not None else ""
                same.setdefault((whole, own or whole), []).append((index, row))
        for (whole, own), places in same.items():
            for begin in range(0, len(places), self.use.request.batch_size):
                yield places[begin : begin + self.use.request.batch_size], whole, own

    def _plain(self, index: int) -> Tensor:
        """The tile (B, h, w, C) of the plain enlargement."""
        return region(self.images, (self.grid.height, self.grid.width), self.grid.boxes[index])

    def _share(self, index: int) -> Tensor:
        """The mask (B, h, w, 1) of a tile."""
        assert self.mask is not None
        return region(self.mask, (self.grid.height, self.grid.width), self.grid.boxes[index], "linear")


def _factor(host: Host, model: MODEL, scale: float) -> float:
    """What stored latents are multiplied by so that the network sees raw ones times `scale`."""
    if scale == 0:
        return 1.0
    channels, dims = host.latent_format(model)
    one = torch.ones(1, channels, *(1,) * dims)
    zero, own = (host.latents_in(model, x) for x in (0 * one, one))
    if bool(torch.count_nonzero(zero)) or float((own - own.flatten()[0]).abs().max()) > 0:
        raise ValueError(
            f"latent_scale {scale:g} replaces a factor, and this model's latents are shifted too: leave it at 0"
        )
    return scale / float(own.flatten()[0])
