"""The README's pictures: the embedded flow model before and after each of what Retort does to it, from the same noise.

`python -m retort.benchmarks.gallery [--quick] [--out DIR] [--work DIR] [--only NAME ...]`. Nobody chose among pictures:
they are of eight of each benchmark's own prompts, its first or every fifth. The preference is trained first where
--work does not hold it.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..files.pictures import rounded
from ..hosts.headless.host import host
from ..models import evaluate, loader
from ..sampling.accounts import Budget
from ..sampling.particles import BestOfConfig
from ..sampling.tree import DTS_STAR
from . import distillation, preference_runs, reflection, restoration, search, searching
from .demo import contact_sheet

SHOWN = 8
LEAVES = 32  # as many samples' calls as a search may spend
TEACHER_CFG = 2.0


def pictures(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [0, 1]."""
    return [Image.fromarray(row.numpy()) for row in rounded(images.movedim(1, -1))]


def distilled(options: argparse.Namespace) -> dict[str, list[Image.Image]]:
    """The teacher, and its students of four calls and of one."""
    count = 5 if options.quick else SHOWN
    teacher, student = distillation.samplers("flow")
    rows = {f"the model itself: {2 * distillation.TEACHER_STEPS} calls of its network": teacher(TEACHER_CFG)}
    for name, label in (("flow_dmd2_4step", "its DMD2 student: 4 calls"), ("flow_dmd2_1step", "another: 1 call")):
        rows[label] = student(loader.load_student(name), distillation.RUNS[name])
    return {label: pictures(distillation.measure("flow", sampler, count)[1]) for label, sampler in rows.items()}


def searched(options: argparse.Namespace) -> dict[str, list[Image.Image]]:
    """One sample, and the best of a search, for a reward that wants the prompt and a bold stroke."""
    count, leaves = (1, 2) if options.quick else (SHOWN, LEAVES)
    model, _, vae = host.embedded("flow")
    reward = searching.judge(1.0)
    rows: dict[str, list[Image.Image]] = {}
    for label, config, samples in (
        ("one sample: 20 calls", BestOfConfig(), 1),
        (f"the best for prompt and bold stroke that DTS* finds in {20 * leaves} calls", DTS_STAR, leaves),
    ):
        for prompt in search.prompts(count):
            task = searching.Task(prompt)
            budget = Budget(calls=task.steps * samples)
            _, state = searching.searched(task, config, budget, 0, searching.judged(vae, reward, prompt))
            image = host.decode(vae, model.latent.process_out(state.best.found[0].latent[None].float()))
            rows.setdefault(label, []).extend(pictures(image.movedim(-1, 1)))
    return rows


def reflected(options: argparse.Namespace) -> dict[str, list[Image.Image]]:
    """A style LoRA at 0.8, plain and reflected off itself at -1.5."""
    count = 5 if options.quick else SHOWN
    pair, models, reference = reflection.PAIRS["LoRA 0.8 / -1.5"], reflection.Models(), evaluate.reference()
    return {
        label: pictures(reflection.measure(pair, way, models, count, reference).images)
        for label, way in (("a LoRA of bold strokes at 0.8, as many calls", "equal calls"), ("reflected", "reflected"))
    }


def preferred(options: argparse.Namespace) -> dict[str, list[Image.Image]]:
    """The model, and what DPO made of it with 500 pairs: bold strokes and warm ink, which no prompt names."""
    run = preference_runs.RUNS["dpo"]
    if options.quick:
        run = replace(run, training={**run.training, "steps": 1})
    folder = preference_runs.train("gallery dpo" if options.quick else "flow dpo", run, options.work)
    words = preference_runs.prompts()[1][:: 40 // SHOWN][: 1 if options.quick else SHOWN]
    tuned = preference_runs.checkpoint(folder, run.config()["training"]["steps"])
    return {
        label: pictures(
            loader.load_autoencoder().decode(preference_runs.latents("flow", lora, words, [0] * len(words)))
        )
        for label, lora in (("the model", None), ("after 500 pairs that like bold strokes and warm ink", tuned))
    }


def restored(options: argparse.Namespace) -> dict[str, list[Image.Image]]:
    """Held-out digits damaged beyond recognition, restored in one call with their captions and without."""
    rows = restoration.harmed(restoration.STRENGTHS["strong"], 3 if options.quick else SHOWN)
    ways = restoration.Restorers(options.work)
    made = {
        f"restored in one call, {label}": ways.once("one step", rows.damaged, rows.captions[caption])
        for label, caption in (("told what they show", "true"), ("told nothing", "none"))
    }
    return {
        label: pictures(images.movedim(-1, 1))
        for label, images in ({"damaged": rows.damaged} | made | {"what they were": rows.clean}).items()
    }


PICTURES = {
    "distilled": distilled,
    "searched": searched,
    "reflected": reflected,
    "preferred": preferred,
    "restored": restored,
}


def main() -> None:
    """Draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few columns, and hardly any training")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures", help="folder of the pictures")
    parser.add_argument(
        "--work", type=Path, default=Path("build/preference"), help="folder of the preference's training"
    )
    parser.add_argument("--only", nargs="*", choices=PICTURES, default=list(PICTURES), help="draw these alone")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        contact_sheet(PICTURES[name](options)).save(options.out / f"{name}.jpg", quality=88)


if __name__ == "__main__":
    main()
