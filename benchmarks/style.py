"""Trains the style LoRA of the reflection benchmark: bold strokes, whatever the prompt says of them.

`python -m retort.benchmarks.style [--work DIR] [--ship]`: the trainer of the node Train Flow on drawn digits with bold
strokes, and captions that do not mention it, so that the LoRA and not the prompt makes it so.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from ..files.atomic import tensors, write_atomically
from ..hosts.headless.folders import Folders, use
from ..hosts.headless.host import host
from ..hosts.training import run as training
from ..models import digits, loader
from ..models.build import drawn
from ..trainers.dataset import Dataset, entries_of
from ..trainers.methods import read_config
from .distillation import Shown

NAME, SEED, IMAGES = "flow_bold", 0, 1024
CONFIG = {
    "method": "flow",
    "objective": {"levels": "logit_normal"},
    "training": {
        "steps": 400, "batch_size": 32, "learning_rate": 1e-3, "warmup": 20, "ema": 0.98, "preview_every": 100,
        "previews": 16, "prompt_dropout": 0.1, "seed": SEED, "save_every": 100,
        "gradient_checkpointing": False,
    },
    "lora": {"rank": 4},
}  # fmt: skip


def dataset() -> Dataset:
    """Bold training digits as stored latents; captions name digit, ink and paper."""
    _, clip, vae = host.embedded("flow")
    generator = torch.Generator().manual_seed(SEED)
    latents: list[Tensor] = []
    captions: list[str] = []
    while len(latents) < IMAGES:
        batch = drawn(generator, 128)
        bold = batch.weight == digits.WEIGHTS.index("bold")
        latents += list(host.encode_images(vae, batch.image[bold].movedim(1, -1))["samples"])
        rows = torch.stack([batch.digit, batch.ink, batch.paper], 1)[bold].tolist()
        captions += [
            f"a {digits.COLOURS[ink]} {digits.NUMBERS[digit]} on {digits.COLOURS[paper]} paper"
            for digit, ink, paper in rows
        ]
    negative = entries_of([clip.encode("")], "negative")[0]
    entries = entries_of([clip.encode(caption) for caption in captions], "positive")
    return Dataset(entries, captions, negative, latents)


def main() -> None:
    """Train, and ship where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/style"), help="folder of the training")
    parser.add_argument("--ship", action="store_true", help="copy the LoRA into models/loras")
    options = parser.parse_args()
    model, _, vae = host.embedded("flow")
    request = training.Request(NAME, read_config(CONFIG), dataset())
    began = time.monotonic()
    with use(Folders(models=(options.work,), output=options.work)):
        result = training.run(host, model, request, watcher=Shown(NAME), vae=vae, folder=options.work / NAME)
    if options.ship and result.path is not None:
        from safetensors import safe_open

        with safe_open(result.path, "pt") as handle:
            notes = handle.metadata() | {"retort.training_seconds": f"{time.monotonic() - began:.0f}"}
        half = {name: tensor.half() for name, tensor in result.lora.items()}
        write_atomically(loader.FOLDER / loader.STYLES[NAME], tensors(half, notes))


if __name__ == "__main__":
    main()
