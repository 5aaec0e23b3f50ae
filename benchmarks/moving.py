"""The README's moving pictures: a picker that is used and a training that shows itself, on ComfyUI's page.

`python -m retort.benchmarks.moving [--only picker|training] [--out DIR]` with COMFYUI_PATH, the folder of a checkout,
in an environment with its packages and PEFT; Chromium is driven by playwright, here or in the Python that
PLAYWRIGHT_PYTHON names. Both are runs of the embedded model on the processor, of some minutes; nothing is drawn by
hand.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from .comfyui import ROOT, Server

PICTURES = Path(__file__).with_name("pictures")
# What is shown, and the width of its picture in pixels.
SHOWN = {"picker": 460, "training": 420}
MOST_BYTES = 1_000_000


def join(frames: list[Path], target: Path, width: int) -> None:
    """One moving WebP of frames whose names end in the milliseconds each is shown. ValueError where it is too large."""
    pictures, times = [], []
    for path in frames:
        with Image.open(path) as image:
            height = round(image.height * width / image.width)
            pictures.append(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
        times.append(int(path.stem.rpartition("_")[2]))
    if not pictures:
        raise ValueError(f"{target.stem}: there are no frames")
    sizes = [picture.size for picture in pictures]
    if len(set(sizes)) > 1:
        raise ValueError(f"{target.stem}: the frames differ in size, {min(sizes)} to {max(sizes)}")
    more: dict[str, Any] = {"append_images": pictures[1:], "duration": times, "loop": 0, "minimize_size": True}
    pictures[0].save(target, save_all=True, quality=70, method=6, **more)
    if (took := target.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{target.name} has {took} bytes, more than {MOST_BYTES}: show fewer frames")


def main() -> None:
    """Run, record and write."""
    parser = argparse.ArgumentParser(prog="moving", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=tuple(SHOWN), help="record this one alone")
    parser.add_argument("--out", type=Path, default=PICTURES, help="folder of the pictures")
    options = parser.parse_args()
    checkout = os.environ.get("COMFYUI_PATH")
    if not checkout:
        raise SystemExit("set COMFYUI_PATH to the folder of a ComfyUI checkout")
    options.out.mkdir(parents=True, exist_ok=True)
    browser = os.environ.get("PLAYWRIGHT_PYTHON", sys.executable)
    names = [options.only] if options.only else list(SHOWN)
    with tempfile.TemporaryDirectory() as folder, Server(Path(checkout).resolve()) as server:
        workflow = ROOT / "workflows" / "3 Teach it your taste.json"
        script = Path(__file__).with_name("moving_browser.py")
        command = [browser, str(script), server.url, folder, str(workflow), *names]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
        for name in names:
            join(sorted(Path(folder).glob(f"{name}_*.png")), options.out / f"{name}.webp", SHOWN[name])


if __name__ == "__main__":
    main()
