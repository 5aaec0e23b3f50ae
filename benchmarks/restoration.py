"""One-step restoration of damaged digits, by caption: accuracy and PSNR beside bicubic, regression and 50 steps.

`python -m retort.benchmarks.restoration [--quick] [--json FILE] [--sheet FILE]` evaluates the committed restorer.
`--train [NAME ...] [--work DIR]` trains first (all without a name), through the same function as the node; a training
that was stopped goes on. `--ship` copies what was trained into models/loras.

Held-out digits are damaged three times, from mild to strong, by the real-world degradation at a fixed strength; the
judge then reads the restored pictures. A caption is the true one, what the embedded captioner reads in the damaged
picture, none, or that of another digit. The multi-step restorer is the teacher from the damaged latent under noise
(SDEdit, Meng et al. 2022, arXiv 2108.01073): 50 guided steps from a level and a guidance that restore most training
digits of that strength by that caption.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..files.atomic import tensors, write_atomically, write_json
from ..hosts.headless.folders import Folders, use
from ..hosts.headless.host import host
from ..hosts.training import run as training
from ..models import captioner, digits, judge, loader, twins
from ..models.build import DAMAGE
from ..restoration.metrics import psnr
from ..restoration.one_step import OneStep, restore
from ..restoration.spoil import Spoiling
from ..sampling.accounts import seed_of
from ..sampling.path import FLOW
from ..sampling.schedule import FlowSchedule
from ..sampling.standard import sample_dpmpp_2m
from ..trainers import watch
from ..trainers.methods import read_config
from .distillation import Shown, dataset
from .report import Figure, Report, arguments, finish

IMAGES = 2048
STEPS = 50
TIMESTEP = 400
LEVELS, CFGS = (0.3, 0.5, 0.7, 0.85), (1.0, 2.5, 4.0)
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
    "batch_size": 32, "learning_rate": 5e-4, "steps": 600, "ema": 0.98, "warmup": 20, "preview_every": 100,
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


def train(name: str, work: Path) -> None:
    """Train one restorer; its LoRA lies in work/loras, its seconds and steps in work/NAME/time.json."""
    run, folder = RUNS[name], work / name
    config = read_config(
        {"method": "instarevive", "objective": {**HARM, **run.objective},
         "training": {**COMMON, "seed": SEED, **run.training}, "lora": {"rank": 16}}
    )  # fmt: skip
    model, _, vae = host.embedded("flow")
    request = training.Request(name, config, dataset(work, keep_pictures=True), loader.load_student(START))
    began = time.monotonic()
    with use(Folders(models=(work,), output=work)):
        training.run(host, model, request, watcher=Shown(name), vae=vae, folder=folder)
    spent = {"seconds": time.monotonic() - began, "threads": torch.get_num_threads()}
    write_json(folder / "time.json", spent)


def ship(work: Path) -> None:
    """Put the restorers that are trained among the embedded weights."""
    for name in SHIPPED:
        file = work / "loras" / f"{name}.safetensors"
        with safe_open(file, "pt") as handle:
            notes = handle.metadata() | {
                f"retort.training_{key}": f"{value:.0f}"
                for key, value in json.loads((work / name / "time.json").read_text(encoding="utf-8")).items()
            }
        state = {key: value.half() for key, value in loader.read_state(file).items()}
        write_atomically(loader.FOLDER / loader.RESTORERS[name], tensors(state, notes))


@dataclass(frozen=True)
class Harmed:
    """Clean and damaged pictures (N, H, W, 3), what the clean ones show (N, 5), and captions of each kind."""

    clean: Tensor
    damaged: Tensor
    shows: Tensor
    captions: dict[str, list[str]]


def harmed(spoil: Spoiling, count: int, split: str = "held_out", seed: int = SEED) -> Harmed:
    """Digits of a split, damaged at one strength."""
    fields, labels = digits.load(split)
    generator = torch.Generator().manual_seed(seed_of(seed, split))
    chosen = torch.randint(len(labels), (count,), generator=generator)
    batch = digits.draw(fields[chosen], labels[chosen], generator)
    clean = batch.image.movedim(1, -1)
    damaged = spoil(clean, [seed_of(seed, split, "damage", i) for i in range(count)])
    shows = torch.stack([getattr(batch, name) for name in judge.HEADS], 1)
    other = shows[torch.arange(count).roll(1)].clone()
    # Another digit in other colours, whatever came before it.
    other[:, 0] = (shows[:, 0] + 1 + other[:, 0] % 9) % 10
    named = {
        kind: [captioner.phrase(*(words[i] for words, i in zip(captioner.NAMES.values(), row, strict=False)))
               for row in values[:, :3].tolist()]
        for kind, values in (("true", shows), ("wrong", other))
    }  # fmt: skip
    own = captioner.load().caption(damaged)
    return Harmed(clean, damaged, shows, {**named, "own": own, "none": [""] * count})


class Restorers:
    """Ways to restore, each (pictures (B, H, W, 3), captions, strength) -> pictures in [0, 1]."""

    def __init__(self, work: Path):
        self.prompts, self.autoencoder = twins.Prompts(loader.load_text_encoder()), loader.load_autoencoder()
        self.schedule = FlowSchedule(twins.SHIFT)
        self.teacher = loader.load_transformer("flow").network
        self.chosen: dict[tuple[str, str], tuple[float, float]] = {}
        loras = {"one step": loader.load_restorer("flow_restorer")}
        trained = work / "loras" / "flow_regression.safetensors"
        if trained.is_file():
            loras["regression"] = loader.read_state(trained)
        self.networks = {name: loader.load_transformer("flow", ((lora, 1.0),)).network for name, lora in loras.items()}

    def encoded(self, images: Tensor) -> Tensor:
        """Model latents (B, 16, 8, 8)."""
        return self.autoencoder.encode(images.movedim(-1, 1))

    def decoded(self, latents: Tensor) -> Tensor:
        """Pictures (B, H, W, 3) in [0, 1]."""
        return self.autoencoder.decode(latents).clamp(0, 1).movedim(1, -1)

    def once(self, name: str, images: Tensor, captions: list[str]) -> Tensor:
        """By a network of one call."""
        denoiser = twins.Denoiser("flow", self.networks[name], self.prompts.encode(captions))
        sigmas = OneStep(TIMESTEP).sigmas(self.schedule, FLOW)
        return self.decoded(restore(denoiser, self.encoded(images), sigmas, path=FLOW))

    def stepped(self, images: Tensor, captions: list[str], level: float, cfg: float, steps: int) -> Tensor:
        """By the teacher from the damaged latent at a noise level: SDEdit."""
        noise = torch.stack([
            torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(seed_of(SEED, "noise", i)))
            for i in range(len(images))
        ])  # fmt: skip
        denoiser = twins.Denoiser("flow", self.teacher, self.prompts.encode(captions), self.prompts.encode([""]), cfg)
        x = FLOW.add_noise(self.encoded(images), torch.full((len(images),), level), noise)
        return self.decoded(sample_dpmpp_2m(denoiser, x, torch.linspace(level, 0, steps + 1), disable=True, path=FLOW))

    def choose(self, strength: str, count: int) -> None:
        """The level and guidance of `stepped` that restore most training digits of a strength, by each caption."""
        rows = harmed(STRENGTHS[strength], count, "train")
        for caption in CAPTIONS[:3]:
            asked, found = list(batches(rows.damaged, rows.captions[caption])), {}
            for level in LEVELS:
                # No caption guides nothing.
                for cfg in CFGS if caption != "none" else CFGS[:1]:
                    made = [self.stepped(*part, level, cfg, min(20, STEPS)) for part in asked]
                    found[level, cfg] = read(torch.cat(made), rows)
            self.chosen[strength, caption] = max(found, key=lambda key: (found[key].digit, found[key].psnr))
        # Nobody gives a wrong caption on purpose.
        self.chosen[strength, "wrong"] = self.chosen[strength, "true"]


@dataclass(frozen=True)
class Seen:
    """Share of pictures whose digit the judge reads rightly, and PSNR to the clean ones in dB."""

    digit: float
    psnr: float


def read(made: Tensor, rows: Harmed) -> Seen:
    """What the judge says of restored pictures (N, H, W, 3)."""
    answers = loader.load_judge()(made.movedim(-1, 1))
    right = answers["digit"].argmax(1) == rows.shows[:, 0]
    return Seen(float(right.float().mean()), float(psnr(made, rows.clean).mean()))


@torch.inference_mode()
def evaluated(report: Report, options: argparse.Namespace) -> list[Tensor]:
    """Fill the report; rows of eight strongly damaged digits and what became of them."""
    count = 24 if options.quick else 512
    ways, sheet = Restorers(options.work), []
    spent: dict[str, list[float]] = {"one step": [], f"{STEPS} steps": []}
    for strength, spoil in STRENGTHS.items():
        rows = harmed(spoil, count)
        ways.choose(strength, 8 if options.quick else 128)
        say(report, f"{strength}, clean", read(rows.clean, rows))
        say(report, f"{strength}, bicubic", read(rows.damaged, rows))
        own = loader.load_judge(loader.CAPTIONER)(rows.damaged.movedim(-1, 1))["digit"].argmax(1) == rows.shows[:, 0]
        report.figures[f"{strength}, the captioner: digit right"] = Figure(float(own.float().mean()), better="higher")
        if strength == "strong":
            sheet += [rows.damaged[:8]]
        for caption in CAPTIONS:
            made: dict[str, Tensor] = {}
            for name in (*ways.networks, f"{STEPS} steps"):
                parts = []
                began = time.perf_counter()
                for images, words in batches(rows.damaged, rows.captions[caption]):
                    if name in ways.networks:
                        parts.append(ways.once(name, images, words))
                    else:
                        parts.append(ways.stepped(images, words, *ways.chosen[strength, caption], STEPS))
                if name in spent:
                    spent[name].append(time.perf_counter() - began)
                made[name] = torch.cat(parts)
                say(report, f"{strength}, {caption} caption, {name}", read(made[name], rows))
            if strength == "strong":
                sheet += [made["one step"][:8], made[f"{STEPS} steps"][:8]] if caption == "true" else []
                sheet += [made["one step"][:8]] if caption in ("own", "none") else []
        if strength == "strong":
            sheet.append(rows.clean[:8])
        for caption in CAPTIONS[:3]:
            name = f"{strength}, {caption} caption, {STEPS} steps"
            level, cfg = ways.chosen[strength, caption]
            report.figures |= {f"{name}: noise level chosen": Figure(level), f"{name}: guidance chosen": Figure(cfg)}
    targets(report)
    shares = [a / b for a, b in zip(spent["one step"], spent[f"{STEPS} steps"], strict=True)]
    report.figures[f"time of one step over {STEPS}"] = Figure(sum(shares) / len(shares), target=1 / 40)
    return sheet


def batches(images: Tensor, captions: list[str]) -> Iterator[tuple[Tensor, list[str]]]:
    """Both in parts of BATCH."""
    for begin in range(0, len(images), BATCH):
        yield images[begin : begin + BATCH], captions[begin : begin + BATCH]


def say(report: Report, name: str, seen: Seen) -> None:
    """Two figures."""
    report.figures[f"{name}: digit right"] = Figure(seen.digit, better="higher")
    report.figures[f"{name}: PSNR"] = Figure(seen.psnr, "dB", better="higher")


def targets(report: Report) -> None:
    """Whether captions help, and whether one step is as good as many."""
    share = {name.removesuffix(": digit right"): f.value for name, f in report.figures.items() if "digit right" in name}
    one = {caption: share[f"strong, {caption} caption, one step"] for caption in CAPTIONS}
    for better, worse in (("true", "own"), ("own", "none"), ("none", "wrong")):
        report.figures[f"strong, one step: {better} over {worse} caption"] = Figure(
            one[better] - one[worse], target=0.0, better="higher"
        )
    for strength in STRENGTHS:
        for caption in CAPTIONS[:3]:
            name = f"{strength}, {caption} caption"
            gap = share[f"{name}, one step"] - share[f"{name}, {STEPS} steps"]
            report.figures[f"{name}: one step over {STEPS} steps"] = Figure(gap, target=-0.02, better="higher")


def main() -> None:
    """Train where asked, measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--train", nargs="*", metavar="NAME", help="train these first; without a name, all")
    parser.add_argument("--work", type=Path, default=Path("build/restoration"), help="folder of the trainings")
    parser.add_argument("--ship", action="store_true", help="copy the trained restorer into models/loras")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write a contact sheet of the strong damage")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.train is not None:
        for name in options.train or RUNS:
            train(name, options.work)
    if options.ship:
        ship(options.work)
    report = Report("restoration")
    rows = evaluated(report, options)
    if options.sheet:
        watch.save_sheet(torch.cat(rows), options.sheet)
    finish(report, options)


if __name__ == "__main__":
    main()
