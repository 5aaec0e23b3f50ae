"""One-step restoration of damaged digits, by caption: accuracy and PSNR beside bicubic, regression and 50 steps.

`python -m retort.benchmarks.restoration [--quick] [--json FILE] [--sheet FILE]` evaluates the committed restorer.
`--train [NAME ...] [--work DIR]` trains first (all without a name), through the same function as the node; a training
that was stopped goes on. `--ship` copies what was trained into models/loras.

Held-out digits are damaged three times, from mild to strong, by the real-world degradation at a fixed strength; the
judge then reads the restored pictures. A caption is the true one, what the embedded captioner reads in the damaged
picture, none, or that of another digit. The multi-step restorer is the teacher from the damaged latent under noise
(SDEdit, Meng et al. 2022, arXiv 2108.01073): 50 guided steps from a level and a guidance that were chosen on training
digits, for each strength and caption apart.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..hosts import training
from ..hosts.headless import host
from ..hosts.headless.folders import Folders, use
from ..models import captioner, digits, judge, loader, twins
from ..models.build import DAMAGE, drawn
from ..restoration.spoil import Spoiling
from ..sampling.accounts import seed_of
from ..sampling.schedule import FlowSchedule
from ..sampling.standard import sample_dpmpp_2m
from ..trainers import watch
from ..trainers.dataset import Dataset, entries_of
from ..trainers.files import tensors, write_atomically
from ..trainers.methods import read_config
from .distillation import Shown
from .report import Figure, Report, arguments, finish

IMAGES = 2048
STEPS = 50
SEED = 0
BATCH = 32
STRENGTHS = {
    "mild": Spoiling("real_world", 0.4, 0.4, 2.0, 2.0),
    "medium": Spoiling("real_world", 0.8, 0.8, 4.0, 4.0),
    "strong": Spoiling("real_world", 1.0, 1.0, 8.0, 8.0),
}
CAPTIONS = ("true", "own", "none", "wrong")


@dataclass(frozen=True)
class Run:
    """One restorer: settings of the objective and of the training, beside the common ones."""

    objective: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


COMMON = {
    "batch_size": 32, "learning_rate": 5e-4, "steps": 900, "ema": 0.98, "warmup": 20, "preview_every": 100,
    "previews": 32, "save_every": 100, "gradient_checkpointing": False, "prompt_dropout": 0.1,
}  # fmt: skip
HARM = {"weakest": DAMAGE.weakest, "strongest": DAMAGE.strongest, "least": DAMAGE.least, "most": DAMAGE.most}
RUNS = {
    "flow_restorer": Run({"cfg": 2.5, "regression_steps": 300, "ratio": 2}),
    "flow_regression": Run({"matching_weight": 0.0}),
}
# Both go on from the student that draws a digit in one call.
START = "flow_dmd2_1step"
SHIPPED = ("flow_restorer",)


def dataset(work: Path) -> Dataset:
    """Training digits as pictures, latents and random captions, made once."""
    path = work / "data.safetensors"
    if not path.is_file():
        _, clip, vae = host.embedded("flow")
        generator = torch.Generator().manual_seed(SEED)
        latents: list[Tensor] = []
        pictures: list[Tensor] = []
        captions: list[str] = []
        for _ in range(IMAGES // 128):
            batch = drawn(generator, 128)
            images = (batch.image.movedim(1, -1) * 255).round()
            latents += list(host.encode_images(vae, images / 255)["samples"])
            pictures += list(images.to(torch.uint8))
            values = torch.stack([getattr(batch, name) for name in judge.HEADS], 1).tolist()
            captions += [digits.describe(*row, generator)[0] for row in values]
        entries = entries_of([clip.encode(caption) for caption in captions], "positive")
        negative = entries_of([clip.encode("")], "negative")[0]
        Dataset(entries, captions, negative, latents, pictures=pictures).save(path)
    return Dataset.load(path)


def train(name: str, work: Path) -> None:
    """Train one restorer; its LoRA lies in work/loras, its seconds and steps in work/NAME/time.json."""
    run, folder = RUNS[name], work / name
    config = read_config(
        {"method": "instarevive", "objective": {**HARM, **run.objective},
         "training": {**COMMON, "seed": SEED, **run.training}, "lora": {"rank": 16}}
    )  # fmt: skip
    model, _, vae = host.embedded("flow")
    request = training.Request(name, config, dataset(work), loader.load_student(START))
    began = time.monotonic()
    with use(Folders(models=(work,), output=work)):
        training.run(host, model, request, watcher=Shown(name), vae=vae, folder=folder)
    spent = {"seconds": time.monotonic() - began, "threads": torch.get_num_threads()}
    (folder / "time.json").write_text(json.dumps(spent) + "\n", encoding="utf-8")


if __name__ == "__main__":
    import sys
    train(sys.argv[1], Path(sys.argv[2]))
