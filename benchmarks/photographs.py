"""Photographs that no network saw, damaged and restored: the embedded restorer, classical ways, regression alone.

`python -m retort.benchmarks.photographs [--quick] [--json FILE] [--work DIR] [--sheet FILE]`. Four whole photographs of
scikit-image (`models.photographs.HELD_OUT`), at a half and at a quarter of their size, by the real-world degradation.
Restored through the function that the node *Restore* calls, with the caption that stands beside the photograph in
`models.photographs`. The classical row is, for each measure apart, the best of five ways and their settings.
Regression alone is the same network trained as long without the distribution's pull: --work is the folder of
`models.build_photos`, which is not shipped, and without it the row is left out.

The feature distance is LPIPS' formula on the embedded eye (`models.photo_eye`), which was in nobody's loss; on training
photographs it chose how much of the matching is shipped. "clean" is its probability that a picture is undamaged, and
needs no clean one; blur is scikit-image's `blur_effect`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..files.pictures import rounded
from ..hosts.headless import photographs as shipped
from ..hosts.headless.host import host
from ..hosts.restoration import run as restoration
from ..hosts.restoration.run import RestorationRequest, Size
from ..models import build_photos, loader, photographs
from ..models.photo_eye import Eye
from ..restoration.degradation import RealWorld, degrade
from ..restoration.perceptual import feature_distance
from ..restoration.resize import region
from ..restoration.tiles import Tiling
from .demo import contact_sheet
from .report import Figure, Report, arguments, finish

# Enlargement and strength of the damage.
SETTINGS = {"x2": (2.0, 0.5), "x4": (4.0, 0.5)}
SEEDS = (1, 2, 3)
TILING = Tiling(256, 32)
Way = Callable[[Tensor, float, str], Tensor]


@dataclass(frozen=True)
class Measured:
    """psnr in dB, ssim; distance: of features; clean: the eye's probability; blur: 0 to 1; seconds: a megapixel's."""

    psnr: float
    ssim: float
    distance: float
    clean: float
    blur: float
    seconds: float


LOWER = ("distance", "blur", "seconds")


def bicubic(image: Tensor, scale: float, caption: str) -> Tensor:
    """Enlarged and left so."""
    height, width = (round(side * scale) for side in image.shape[1:3])
    return region(image, (height, width)).clamp(0, 1)


def classical() -> Iterator[tuple[str, Way]]:
    """scikit-image's ways, on the enlarged picture."""
    from skimage import filters
    from skimage import restoration as ways

    def on(act: Callable[[np.ndarray], np.ndarray], image: Tensor, scale: float, caption: str) -> Tensor:
        made = act(bicubic(image, scale, caption)[0].double().numpy())
        return torch.from_numpy(np.clip(made, 0, 1)).float()[None]

    bell = np.exp(-(np.arange(-4, 5)[:, None] ** 2 + np.arange(-4, 5)[None] ** 2) / 2 / 1.2**2)
    bell /= bell.sum()

    def lucy(times: int, x: np.ndarray) -> np.ndarray:
        return np.stack([ways.richardson_lucy(x[..., c], bell, num_iter=times) for c in range(3)], -1)

    for strength in (0.03, 0.06):
        yield (
            f"non-local means {strength}",
            partial(on, partial(ways.denoise_nl_means, h=strength, fast_mode=True, channel_axis=-1)),
        )
    for weight in (0.02, 0.06):
        yield (
            f"total variation {weight}",
            partial(on, partial(ways.denoise_tv_chambolle, weight=weight, channel_axis=-1)),
        )
    yield "bilateral", partial(on, lambda x: ways.denoise_bilateral(x, channel_axis=-1))
    yield "unsharp mask", partial(on, lambda x: filters.unsharp_mask(x, radius=2, amount=1.0, channel_axis=-1))
    for times in (5, 15):
        yield f"Richardson-Lucy {times}", partial(on, partial(lucy, times))


def restored(model: Any, image: Tensor, scale: float, caption: str) -> Tensor:
    """By a MODEL of the photographs' kind."""
    _, clip, vae = shipped.load()
    request = RestorationRequest(Size(scale, TILING), caption, batch_size=8)
    return restoration.run(host, model, clip, vae, image, request)


def measured(made: Tensor, clean: Tensor, eye: Eye, seconds: float) -> Measured:
    """Of a restored picture (1, H, W, 3)."""
    from skimage import measure, metrics

    a, b = made[0].double().numpy(), clean[0].double().numpy()
    return Measured(
        float(metrics.peak_signal_noise_ratio(b, a, data_range=1.0)),
        float(metrics.structural_similarity(b, a, data_range=1.0, channel_axis=-1)),
        float(feature_distance(eye(made), eye(clean))[0]),
        float(eye.answers(made)[1].sigmoid()[0]),
        float(measure.blur_effect(a, channel_axis=-1)),
        seconds / (clean.shape[1] * clean.shape[2] / 1e6),
    )


def mean(rows: list[Measured]) -> Measured:
    """Of each measure."""
    return Measured(*(float(np.mean([getattr(row, f.name) for row in rows])) for f in fields(Measured)))


def best(rows: dict[str, Measured]) -> Measured:
    """Each measure's best, whichever way has it; the time is that of the way nearest in features."""
    nearest = min(rows.values(), key=lambda row: row.distance)
    picked = {f.name: (min if f.name in LOWER else max)(getattr(row, f.name) for row in rows.values())
              for f in fields(Measured)}  # fmt: skip
    return Measured(**{**picked, "seconds": nearest.seconds})


def cases(setting: str, quick: bool) -> Iterator[tuple[str, Tensor, Tensor, str]]:
    """(name, clean (1, H, W, 3), damaged (1, h, w, 3), caption), sides cut to whole multiples."""
    scale, strength = SETTINGS[setting]
    for name, photograph in photographs.HELD_OUT.items():
        image = photographs.load(name)
        height, width = (side // 4 * 4 for side in image.shape[:2])
        clean = image[None, :height, :width]
        if quick:
            clean = clean[:, 100:228, 100:228]
        for seed in SEEDS[:1] if quick else SEEDS:
            yield name, clean, degrade(clean, RealWorld(shrink=scale, strength=strength), seed), photograph.caption


@torch.inference_mode()
def evaluated(report: Report, options: argparse.Namespace) -> dict[str, list[Image.Image]]:
    """Fill the report; for the sheet a part of each photograph at x2."""
    eye, model = loader.load_photo_eye(), shipped.load()[0]
    ways: dict[str, Way] = {"bicubic": bicubic, **dict(classical())}
    if (options.work / "baseline.safetensors").is_file():
        plain = build_photos.build_baseline(options.work).network
        ways["regression alone"] = partial(restored, shipped.model_of(plain))
    ways["restored"] = partial(restored, model)
    shown: dict[str, list[Image.Image]] = {}
    for setting, (scale, _) in SETTINGS.items():
        rows: dict[str, list[Measured]] = {name: [] for name in ways}
        for number, (name, clean, damaged, caption) in enumerate(cases(setting, options.quick)):
            sample = setting == "x2" and number % (1 if options.quick else len(SEEDS)) == 0
            for way, act in ways.items():
                began = time.perf_counter()
                made = act(damaged, scale, caption)
                rows[way].append(measured(made, clean, eye, time.perf_counter() - began))
                if sample and way in ("bicubic", "regression alone", "restored"):
                    shown.setdefault(LABELS[way], []).append(_part(name, made))
            if sample:
                shown.setdefault("the photograph", []).append(_part(name, clean))
        found = {way: mean(values) for way, values in rows.items()}
        old = {way for way, _ in classical()}
        table = {"bicubic": found["bicubic"], "best classical": best({way: found[way] for way in old}),
                 **{way: found[way] for way in found if way not in old and way != "bicubic"}}  # fmt: skip
        for way, one in table.items():
            for part in fields(Measured):
                unit = {"psnr": "dB", "seconds": "s"}.get(part.name, "")
                better: Literal["lower", "higher"] = "lower" if part.name in LOWER else "higher"
                report.figures[f"{setting}, {way}: {part.name}"] = Figure(getattr(one, part.name), unit, better=better)
        for way in table:
            if way != "restored":
                ratio = table["restored"].distance / table[way].distance
                report.figures[f"{setting}: distance restored over {way}"] = Figure(ratio, target=1.0)
        nearest = min(old, key=lambda way: found[way].distance)
        report.figures[f"{setting}: nearest classical way is {nearest}"] = Figure(found[nearest].distance)
    return shown


LABELS = {"bicubic": "bicubic", "regression alone": "regression alone", "restored": "restored in one call"}
PARTS = {"camera": (80, 180), "chelsea": (60, 130), "coffee": (60, 150), "rocket": (150, 250)}


def _part(name: str, image: Tensor) -> Image.Image:
    top, left = (max(0, min(at, side - 128)) for at, side in zip(PARTS[name], image.shape[1:3], strict=True))
    cut = image[0, top : top + 128, left : left + 128]
    return Image.fromarray(rounded(cut).numpy())


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/photos"), help="folder of models.build_photos")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write parts of the photographs side by side")
    options = parser.parse_args()
    report = Report("photographs")
    shown = evaluated(report, options)
    if options.sheet:
        contact_sheet(shown).save(options.sheet, quality=90)
    finish(report, options)


if __name__ == "__main__":
    main()
