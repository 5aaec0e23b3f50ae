"""Pictures side by side with their scores beneath, the best first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...files.pictures import as_image, rounded

SIDE, LABEL, FONT, GAP = 256, 30, 18, 8
PAPER, INK, BEST = (24, 26, 30), (205, 210, 218), (130, 215, 140)


def sheet(images: Tensor, scores: Sequence[float], columns: int = 4, most: int = 64) -> Tensor:
    """(1, H, W, 3) in [0, 1]: up to `most` of images (B, H, W, 3) by falling score; a label is rank, score, index."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:most]
    labels = [f"{place + 1}.  {scores[i]:.5g}  (image {i})" for place, i in enumerate(order)]
    return labelled(images[order], labels, [place == 0 for place in range(len(order))], columns)


def pairs_sheet(base: Tensor, tuned: Tensor, scores: Sequence[tuple[float, float]]) -> Tensor:
    """(1, H, W, 3) in [0, 1]: pairs of images (N, H, W, 3), two pairs in a row, base on the left; winners are green."""
    images = torch.stack([base, tuned], 1).flatten(0, 1)
    labels = [f"{i + 1}. {who}" for i, (a, b) in enumerate(scores) for who in (f"base  {a:.5g}", f"tuned  {b:.5g}")]
    best = [wins for a, b in scores for wins in (a > b, b > a)]
    return labelled(images, labels, best, 4)


def labelled(images: Tensor, labels: Sequence[str], best: Sequence[bool], columns: int) -> Tensor:
    """(1, H, W, 3) in [0, 1]: images (B, H, W, 3) in rows with a text beneath each; green where `best` says so."""
    from PIL import Image, ImageDraw, ImageFont

    h, w = images.shape[1:3]
    scale = SIDE / max(h, w)
    tall, wide = max(1, round(h * scale)), max(1, round(w * scale))
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    size = (columns * (wide + GAP) + GAP, rows * (tall + LABEL + GAP) + GAP)
    canvas = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT)
    pixels = rounded(images).numpy()
    for place, (label, wins) in enumerate(zip(labels, best, strict=True)):
        left, top = GAP + place % columns * (wide + GAP), GAP + place // columns * (tall + LABEL + GAP)
        shown = Image.fromarray(pixels[place]).resize((wide, tall), Image.Resampling.BICUBIC)
        canvas.paste(shown, (left, top))
        pen.text((left, top + tall + 4), label, fill=BEST if wins else INK, font=font)
    return as_image(canvas)


def table(scores: Sequence[float], prompts: Sequence[str], name: str) -> str:
    """A line for each picture, the best first."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    mean = sum(scores) / len(scores)
    lines = [f"{name}: mean {mean:.5g}, best {scores[order[0]]:.5g}, worst {scores[order[-1]]:.5g}"]
    lines += [f"{place + 1}. {scores[i]:.5g}  image {i}  {prompts[i]}".rstrip() for place, i in enumerate(order)]
    return "\n".join(lines)
