"""The templates' thumbnails: results of the demo models, and below them whether a template needs files.

`python -m retort.benchmarks.thumbnails [--out DIR]` cuts them from the pictures of README and of the help pages, which
`gallery` and the workflows drew: a result of the same kind where there is none of the template itself. What a large
model would draw is not shown, and the thumbnail says so.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

ROOT = Path(__file__).resolve().parents[1]
STRIPS, HELP = ROOT / "benchmarks" / "pictures", ROOT / "extensions" / "comfyui" / "docs" / "pictures"
SIZE, FOOT = (480, 360), 44
# By template: a picture, and what share of its width is shown.
SHOWN = {
    "1 Quick start - 4 steps instead of 50": (STRIPS / "distilled.jpg", 0.5),
    "2 Train a student that draws in 1 step": (HELP / "distilled.jpg", 0.6),
    "3 Teach it your taste": (STRIPS / "preferred.jpg", 0.5),
    "4 Search for a better picture": (STRIPS / "searched.jpg", 0.5),
    "5 Restore a photograph": (STRIPS / "photographs.jpg", 1.0),
    "6 Reflect - More of what a LoRA adds": (STRIPS / "reflected.jpg", 0.5),
    "Distil - A teacher and three students": (HELP / "distilled.jpg", 1.0),
    "Distil - A student by its own recipe": (HELP / "drawn.jpg", 1.0),
    "Distil - A student by its parts": (HELP / "drawn.jpg", 1.0),
    "Distil - A noise-prediction model": (STRIPS / "distilled.jpg", 0.75),
    "Distil - Train in a process of its own": (HELP / "chart.jpg", 1.0),
    "Prefer - Pairs that a reward labels": (HELP / "preference.jpg", 1.0),
    "Prefer - Train on a reward": (HELP / "train_reward.jpg", 1.0),
    "Reflect - Guided against unguided": (HELP / "reflection.jpg", 1.0),
    "Reflect - A model against an earlier one": (STRIPS / "reflected.jpg", 0.625),
    "Restore - A caption for each tile": (HELP / "captions.jpg", 1.0),
    "Restore - Digits in one step": (STRIPS / "restored.jpg", 0.75),
    "Restore - Infrared with spectral guidance": (HELP / "spectral.jpg", 1.0),
    "Restore - Train a restorer": (HELP / "train_restorer.jpg", 1.0),
    "Sample - Five small samplers": (HELP / "teleport.jpg", 1.0),
    "Search - Keep a search and go on": (HELP / "drawn.jpg", 1.0),
    "Search - Learn the noise for a prompt": (HELP / "noise_policy.jpg", 1.0),
    "Train - A style from eight pictures": (STRIPS / "reflected.jpg", 0.75),
    "Train - What memory a training takes": (HELP / "chart.jpg", 1.0),
    "SDXL - DMD2 in 4 steps": (STRIPS / "distilled.jpg", 0.5),
    "SDXL - Diff-Instruct in 1 step": (STRIPS / "distilled.jpg", 0.75),
    "SDXL - Search by PickScore": (STRIPS / "searched.jpg", 0.75),
    "SDXL - MaPO with pairs that PickScore labels": (STRIPS / "preferred.jpg", 0.75),
    "SDXL - Reflect Juggernaut against its base": (STRIPS / "reflected.jpg", 0.625),
    "SDXL - Reflect a LoRA": (STRIPS / "reflected.jpg", 0.5),
    "SD3 - TDM in 4 steps": (STRIPS / "distilled.jpg", 0.625),
    "Boogu - Turbo in 4 steps": (STRIPS / "distilled.jpg", 0.5),
    "ERNIE-Image - Turbo in 8 steps": (STRIPS / "distilled.jpg", 0.5),
    "Flux.2 - Dev Turbo in 8 steps": (STRIPS / "distilled.jpg", 0.5),
    "Flux.2 - Klein in 4 steps": (STRIPS / "distilled.jpg", 0.5),
    "LTX-2.3 - Video with sound in two stages": (STRIPS / "distilled.jpg", 0.5),
    "MiniMax-H3 - Video with sound in 8 steps": (STRIPS / "distilled.jpg", 0.5),
    "Qwen-Image - Lightning in 4 steps": (STRIPS / "distilled.jpg", 0.5),
    "Qwen-Image - Train an edit on pairs": (HELP / "chart.jpg", 1.0),
    "SDXL - Make a 4-step LoRA of your checkpoint": (HELP / "distilled.jpg", 0.6),
    "SD3.5 - Large Turbo in 4 steps": (STRIPS / "distilled.jpg", 0.5),
    "Wan 2.1 - CausVid in 9 steps": (STRIPS / "distilled.jpg", 0.5),
    "Wan 2.2 - Text to video in 4 steps": (STRIPS / "distilled.jpg", 0.5),
    "Wan 2.2 - Train both networks on your pictures": (HELP / "chart.jpg", 1.0),
    "Z-Image - Train a style on your pictures": (STRIPS / "reflected.jpg", 0.75),
    "Z-Image - Turbo in 8 steps": (STRIPS / "distilled.jpg", 0.5),
    "Flux - Reflect guidance": (HELP / "reflection.jpg", 1.0),
    "PixArt - Restore with InstaRevive": (STRIPS / "photographs.jpg", 1.0),
}
# Families whose templates need files that have to be downloaded.
NEEDS = {family: f"needs {family}" for family in (
    "SDXL", "SD3", "SD3.5", "Flux", "Flux.2", "Qwen-Image", "Z-Image", "ERNIE-Image", "Boogu", "Wan 2.1", "Wan 2.2",
    "LTX-2.3", "MiniMax-H3",
)} | {"PixArt": "needs InstaRevive"}  # fmt: skip


def words(name: str) -> str:
    """What stands below a thumbnail."""
    needs = NEEDS.get(name.split(" - ")[0])
    return f"{needs}; shown: the demo model" if needs else "no download"


def thumbnail(name: str) -> Image.Image:
    """The picture of a template, SIZE large, with its line of words. KeyError where SHOWN has none."""
    source, share = SHOWN[name]
    with Image.open(source) as opened:
        picture = opened.convert("RGB")
    picture = picture.crop((0, 0, round(share * picture.width), picture.height))
    room = (SIZE[0], SIZE[1] - FOOT)
    sheet = Image.new("RGB", SIZE, "white")
    fitted = ImageOps.contain(picture, room, Image.Resampling.LANCZOS)
    sheet.paste(fitted, ((room[0] - fitted.width) // 2, (room[1] - fitted.height) // 2))
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((0, room[1], *SIZE), fill="#1f6f3f" if words(name) == "no download" else "#7a4a00")
    pen.text((12, room[1] + 9), words(name), fill="white", font=ImageFont.load_default(22))
    return sheet


def main() -> None:
    """Write all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "workflows", help="folder that they are written into")
    options = parser.parse_args()
    for name in SHOWN:
        thumbnail(name).save(options.out / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
