"""Students of the embedded twins by every distillation method, beside their teachers at 50 steps.

`python -m retort.benchmarks.distillation [--quick] [--json FILE] [--sheet FILE]` evaluates the committed students.
`--train [NAME ...] [--work DIR]` trains them first (all without a name), through the same function as the nodes; a
training that was stopped goes on. `--ship` copies what was trained into models/loras.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..files.atomic import tensors, write_atomically
from ..hosts.headless.folders import Folders, use
from ..hosts.headless.host import host
from ..hosts.training import run as training
from ..models import evaluate, loader, twins
from ..sampling.distilled import Mode
from ..trainers import watch
from ..trainers.dataset import Dataset, entries_of
from ..trainers.methods import read_config
from .report import Figure, Report, arguments, finish

IMAGES = 2048
TEACHER_STEPS = 50
TEACHER_CFGS = (2.0, 3.0, 4.0)
SEED = 0


@dataclass(frozen=True)
class Run:
    """One student: of which twin, by which method, in how many calls; settings beside the common ones."""

    kind: str
    method: str
    calls: int
    objective: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def mode(self) -> Mode:
        """How its sampler goes from level to level."""
        return "deterministic" if self.method == "tdm" else "renoise"


WARM = {"regression_steps": 300, "pairs": 1024, "pair_steps": 12, "cfg": 2.5, "ratio": 2}
GAN = {**WARM, "gan_weight": 0.1}
TDM = ({"cfg": 4.0, "fake_rate": 3.0}, {"steps": 600, "learning_rate": 2e-4})
COMMON = {
    "batch_size": 32, "learning_rate": 5e-4, "steps": 900, "ema": 0.98, "warmup": 20, "preview_every": 100,
    "previews": 32, "save_every": 100, "gradient_checkpointing": False,
}  # fmt: skip
RUNS = {
    "flow_dmd2_1step": Run("flow", "dmd2", 1, GAN),
    "flow_dmd2_4step": Run("flow", "dmd2", 4, GAN),
    "flow_js_1step": Run("flow", "f_distill", 1, {**GAN, "divergence": "jensen_shannon"}),
    "flow_fkl_1step": Run("flow", "f_distill", 1, {**GAN, "divergence": "forward_kl"}),
    "flow_tdm_4step": Run("flow", "tdm", 4, *TDM),
    "flow_di_star_1step": Run("flow", "di_star", 1, {"cfg": 2.5, "ratio": 2}, {"steps": 400, "learning_rate": 2e-4}),
    "eps_dmd2_1step": Run("eps", "dmd2", 1, GAN),
    "eps_tdm_4step": Run("eps", "tdm", 4, *TDM),
}
# DI* has no regression of its own: it goes on from DMD2's student, as its authors' does.
STARTS = {"flow_di_star_1step": "flow_dmd2_1step"}


class Shown(watch.Silent):
    """One line now and then."""

    def __init__(self, name: str):
        self._name, self._began = name, time.monotonic()

    def step(self, done: int, total: int, metrics) -> None:
        """A line every fifty steps."""
        if done % 50 == 0 or done == total:
            spent = time.monotonic() - self._began
            numbers = " ".join(f"{k} {v:.3g}" for k, v in sorted(metrics.items()) if k.endswith("_loss"))
            watch_log(f"{self._name}: {done}/{total}, {spent:.0f} s, {numbers}")


def watch_log(text: str) -> None:
    """A line on the terminal at once."""
    from rich.console import Console

    Console().print(text, highlight=False)


def dataset(work: Path, keep_pictures: bool = False) -> Dataset:
    """Training digits as stored latents with random captions, made once.

    keep_pictures: the digits are rounded to 255ths before they are encoded, and kept beside their latents.
    """
    from ..models import digits, judge
    from ..models.build import drawn

    path = work / "data.safetensors"
    if not path.is_file():
        _, clip, vae = host.embedded("flow")
        generator = torch.Generator().manual_seed(SEED)
        latents: list[Tensor] = []
        pictures: list[Tensor] = []
        captions: list[str] = []
        for _ in range(IMAGES // 128):
            batch = drawn(generator, 128)
            images = batch.image.movedim(1, -1)
            if keep_pictures:
                pictures += list((images * 255).round().to(torch.uint8))
                images = (images * 255).round() / 255
            latents += list(host.encode_images(vae, images)["samples"])
            values = torch.stack([getattr(batch, name) for name in judge.HEADS], 1).tolist()
            captions += [digits.described(row, generator)[0] for row in values]
        entries = entries_of([clip.encode(caption) for caption in captions], "positive")
        negative = entries_of([clip.encode("")], "negative")[0]
        Dataset(entries, captions, negative, latents, pictures=pictures or None).save(path)
    return Dataset.load(path)


def train(name: str, work: Path) -> None:
    """Train one student; its LoRA lies in work/loras, its seconds and steps in work/NAME/time.json."""
    run = RUNS[name]
    folder = work / name
    config = read_config(
        {"method": run.method, "objective": {"steps": run.calls, **run.objective},
         "training": {**COMMON, "seed": SEED, **run.training}, "lora": {"rank": 16}}
    )  # fmt: skip
    _share_pairs(name, work)
    model, _, vae = host.embedded(run.kind)
    first = STARTS.get(name)
    start = None if first is None else loader.read_state(work / "loras" / f"{first}.safetensors")
    request = training.Request(name, config, dataset(work), start)
    began = time.monotonic()
    with use(Folders(models=(work,), output=work)):
        training.run(host, model, request, watcher=Shown(name), vae=vae, folder=folder)
    spent = {"seconds": time.monotonic() - began, "threads": torch.get_num_threads()}
    (folder / "time.json").write_text(json.dumps(spent) + "\n", encoding="utf-8")


def _share_pairs(name: str, work: Path) -> None:
    """Teacher pairs of one twin and guidance serve every method."""
    run, folder = RUNS[name], work / name / "pairs"
    keys = ("cfg", "pairs", "pair_steps")
    for other, candidate in RUNS.items():
        same = candidate.kind == run.kind and all(candidate.objective.get(k) == run.objective.get(k) for k in keys)
        theirs = work / other / "pairs"
        if "pairs" in run.objective and same and theirs.is_dir() and not folder.exists():
            shutil.copytree(theirs, folder)


@dataclass(frozen=True)
class Quality:
    """frechet: distance to held-out digits; prompt: share of right answers; recall: share of held-out digits that lie
    among the samples (Kynkäänniemi et al. 2019, arXiv 1904.06991, k = 3); seconds: an image's sampling, undecoded.
    """

    frechet: float
    prompt: float
    recall: float
    seconds: float


def measure(kind: str, sampler, count: int) -> tuple[Quality, Tensor]:
    """Quality over `count` prompts of sampler(noise, words) -> latents, and the images (count, 3, 64, 64)."""
    latents, seconds = [], 0.0
    captions, wanted = evaluate.requests(count, SEED)
    generator = torch.Generator().manual_seed(SEED)
    for begin in range(0, count, evaluate.BATCH):
        words = captions[begin : begin + evaluate.BATCH]
        noise = torch.randn(len(words), 16, 8, 8, generator=generator)
        began = time.perf_counter()
        latents.append(sampler(noise, words))
        seconds += time.perf_counter() - began
    autoencoder, reader = loader.load_autoencoder(), loader.load_judge()
    with torch.inference_mode():
        image = torch.cat([autoencoder.decode(part).clamp(0, 1) for part in latents])
        answers, features = reader(image), reader.features(image)
    return Quality(
        evaluate.judge.frechet_distance(features, evaluate.reference()),
        evaluate.prompt_share(answers, wanted),
        evaluate.recall(features, evaluate.reference()),
        seconds / count,
    ), image


def samplers(kind: str):
    """(teacher(cfg), student(lora, run)): makers of samplers for `measure`."""
    prompts = twins.Prompts(loader.load_text_encoder())
    uncond = prompts.encode([""])

    def teacher(cfg: float):
        network = loader.load_transformer(kind).network
        return lambda noise, words: twins.teach(
            twins.Denoiser(kind, network, prompts.encode(words), uncond, cfg), noise, TEACHER_STEPS
        )

    def student(lora: dict[str, Tensor], run: Run):
        network = loader.load_transformer(kind, ((lora, 1.0),)).network
        return lambda noise, words: twins.study(
            twins.Denoiser(kind, network, prompts.encode(words)), noise, run.calls, run.mode
        )

    return teacher, student


def main() -> None:
    """Train where asked, measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--train", nargs="*", metavar="NAME", help="train these students first; without a name, all")
    parser.add_argument("--work", type=Path, default=Path("build/distillation"), help="folder of the trainings")
    parser.add_argument("--ship", action="store_true", help="copy the trained LoRAs into models/loras")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write a contact sheet of every row")
    options = parser.parse_args()
    if options.train is not None:
        for name in options.train or RUNS:
            train(name, options.work)
    if options.ship:
        ship(options.work)
    report = Report("distillation")
    rows = evaluated(options, report)
    if options.sheet:
        watch.save_sheet(torch.cat(rows).movedim(1, -1), options.sheet)
    finish(report, options)


def ship(work: Path) -> None:
    """Put the trained students, and how long each took, among the embedded weights."""
    for name in RUNS:
        file = work / "loras" / f"{name}.safetensors"
        if file.is_file():
            with safe_open(file, "pt") as handle:
                notes = handle.metadata()
            spent = json.loads((work / name / "time.json").read_text(encoding="utf-8"))
            notes |= {f"retort.training_{key}": f"{value:.0f}" for key, value in spent.items()}
            write_atomically(loader.FOLDER / loader.STUDENTS[name], tensors(loader.read_state(file), notes))


def training_minutes(name: str) -> float:
    """How long a shipped student took, on one thread."""
    with safe_open(loader.FOLDER / loader.STUDENTS[name], "pt") as handle:
        return float(handle.metadata()["retort.training_seconds"]) / 60


def evaluated(options: argparse.Namespace, report: Report) -> list[Tensor]:
    """Fill the report with every row; the first eight images of each."""
    count = 128 if options.quick else 1024
    shown = []
    for kind in ("flow", "eps"):
        teacher, student = samplers(kind)
        teachers = {cfg: measure(kind, teacher(cfg), count) for cfg in TEACHER_CFGS}
        best = max(teachers, key=lambda cfg: (teachers[cfg][0].prompt, -teachers[cfg][0].frechet))
        found: dict[str, Quality] = {}
        for cfg, (quality, image) in teachers.items():
            _rows(report, f"{kind} teacher, {TEACHER_STEPS} steps, cfg {cfg:g}", quality, None)
            shown.append(image[:8])
        for name, run in RUNS.items():
            if run.kind == kind:
                found[name], image = measure(kind, student(loader.load_student(name), run), count)
                _rows(report, name, found[name], teachers[best][0])
                shown.append(image[:8])
                minutes = Figure(training_minutes(name), "min", target=30)
                report.figures[f"{name}: training on one thread"] = minutes
        _verdict(report, kind, found, teachers[best][0], best)
    return shown


def _rows(report: Report, name: str, quality: Quality, teacher: Quality | None) -> None:
    report.figures[f"{name}: Fréchet distance"] = Figure(quality.frechet)
    report.figures[f"{name}: prompt right"] = Figure(quality.prompt, better="higher")
    report.figures[f"{name}: recall"] = Figure(quality.recall, better="higher")
    if teacher is not None:
        report.figures[f"{name}: sampling time over the teacher's"] = Figure(quality.seconds / teacher.seconds)


def _verdict(report: Report, kind: str, found: dict[str, Quality], teacher: Quality, cfg: float) -> None:
    """The targets: the best one-step student against the teacher at the guidance that follows prompts best."""
    single = {name: q for name, q in found.items() if RUNS[name].calls == 1}
    best = min(single, key=lambda name: single[name].frechet)
    student, whose = single[best], f"{kind}, best one-step student ({best})"
    against = f"teacher at cfg {cfg:g}"
    report.figures[f"{whose}: Fréchet distance, {against}"] = Figure(student.frechet, target=teacher.frechet)
    right = Figure(student.prompt, target=teacher.prompt - 0.02, better="higher")
    report.figures[f"{whose}: prompt right, {against} less 2 points"] = right
    report.figures[f"{whose}: time, {against}"] = Figure(student.seconds / teacher.seconds, target=1 / 40)
    others = [n for n in ("flow_js_1step", "flow_fkl_1step") if n in found]
    if others:
        widest = max(others, key=lambda n: found[n].recall)
        figure = Figure(found[widest].recall, target=found["flow_dmd2_1step"].recall, better="higher")
        report.figures[f"{widest}: recall, reverse KL's (DMD2)"] = figure


if __name__ == "__main__":
    main()
