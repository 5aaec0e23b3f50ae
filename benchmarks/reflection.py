"""What reflection does on the embedded flow twin: pairs by cfg, prompt, checkpoint and LoRA, at the same seeds.

`python -m retort.benchmarks.reflection [--quick] [--json FILE] [--sheet FILE]`. Each pair is sampled plainly, with the
field 2 strong - weak that reflection follows to first order (for a cfg pair: at that cfg), plainly with as many network
calls, and reflected. A picture wins when the judge finds its prompt more likely; ties count half. The figures against
ComfyUI need COMFYUI_PATH, the folder of a checkout. The style LoRA is made by `retort.benchmarks.style`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..models import evaluate, judge, loader, twins
from ..models.digits import NUMBERS, WEIGHTS
from ..sampling.grids import simple
from ..sampling.path import FLOW
from ..sampling.reflection import ReflectionConfig, sample_reflection
from ..sampling.schedule import FlowSchedule
from ..sampling.standard import sample_euler
from ..trainers import watch
from .comfyui import inside
from .report import Figure, Report, arguments, finish
from .timing import ratio

KIND, STEPS, SEED = "flow", 20, 0
BOLD = WEIGHTS.index("bold")
WAYS = ("plain", "field", "equal calls", "reflected")


@dataclass(frozen=True)
class Side:
    """A denoiser: variant of the twin, strength of the style LoRA, cfg, and whether it sees the digit's name alone."""

    variant: str = KIND
    lora: float = 0.0
    cfg: float = 1.0
    plain_prompt: bool = False

    @property
    def calls(self) -> int:
        """Network calls for one x0: cfg 0 and 1 need one branch."""
        return 1 if self.cfg in (0.0, 1.0) else 2


@dataclass(frozen=True)
class Pair:
    """strong takes the steps, down goes down before them, weak up. boldness: weight of a bold stroke in the verdict."""

    strong: Side
    weak: Side
    down: Side
    config: ReflectionConfig = ReflectionConfig()
    boldness: float = 0.0


PAIRS = {
    "cfg 2 / 0": Pair(Side(cfg=2.0), Side(cfg=0.0), Side(cfg=2.0)),
    "cfg 4 / 0": Pair(Side(cfg=4.0), Side(cfg=0.0), Side(cfg=4.0)),
    "prompt": Pair(Side(cfg=2.0), Side(plain_prompt=True), Side()),
    "early checkpoint": Pair(Side(cfg=2.0), Side("flow early"), Side()),
    "LoRA 0.8 / -1.5": Pair(Side(cfg=2.0, lora=0.8), Side(lora=-1.5), Side(lora=0.8), boldness=1.0),
}


class Models:
    """Networks and prompts, each made once."""

    def __init__(self) -> None:
        self.prompts = twins.Prompts(loader.load_text_encoder())
        self.uncond = self.prompts.encode([""])
        self._networks: dict[tuple[str, float], torch.nn.Module] = {}

    def side(self, side: Side, words: list[str], short: list[str]) -> twins.Denoiser:
        """The denoiser of a side for one batch of prompts."""
        key = (side.variant, side.lora)
        if key not in self._networks:
            style = loader.read_state(loader.FOLDER / loader.STYLES["flow_bold"])
            loras = ((style, side.lora),) if side.lora else ()
            self._networks[key] = loader.load_transformer(side.variant, loras).network
        network = self._networks[key]
        if side.cfg == 0.0:
            blank = {k: v.expand(len(words), *v.shape[1:]) for k, v in self.uncond.items()}
            return twins.Denoiser(KIND, network, blank)
        cond = self.prompts.encode(short if side.plain_prompt else words)
        return twins.Denoiser(KIND, network, cond, self.uncond, side.cfg)


def equal_steps(pair: Pair, sigmas: Tensor) -> int:
    """Plain steps that take as many network calls as the reflected run."""
    cost = pair.config.cost(sigmas)
    calls = cost.model * pair.strong.calls + cost.reflecting * pair.down.calls + cost.weak * pair.weak.calls
    return round(calls / pair.strong.calls)


@torch.inference_mode()
def sampled(pair: Pair, way: str, models: Models, words: list[str], short: list[str], noise: Tensor) -> Tensor:
    """Model latents (B, 16, 8, 8) by one of WAYS."""
    schedule = FlowSchedule(twins.SHIFT)
    sigmas = simple(schedule, STEPS)
    strong, weak, down = (models.side(s, words, short) for s in (pair.strong, pair.weak, pair.down))
    x = noise * sigmas[0]
    if way == "reflected":
        return sample_reflection(
            strong, x, sigmas, disable=True, path=FLOW, weak=weak, reflecting=down, config=pair.config
        )
    if way == "equal calls":
        sigmas = simple(schedule, equal_steps(pair, sigmas))
    if way == "field":
        return sample_euler(lambda y, s: strong(y, s) + down(y, s) - weak(y, s), x, sigmas, disable=True, path=FLOW)
    return sample_euler(strong, x, sigmas, disable=True, path=FLOW)


@dataclass(frozen=True)
class Found:
    """Of one way: share of prompts right, of bold strokes, Fréchet distance, verdicts (N,), images (N, 3, 64, 64)."""

    prompt: float
    bold: float
    frechet: float
    score: Tensor
    images: Tensor


def measure(pair: Pair, way: str, models: Models, count: int, reference: Tensor) -> Found:
    """Sample `count` prompts of one way, and judge them."""
    captions, wanted = evaluate.requests(count, SEED)
    generator = torch.Generator().manual_seed(SEED)
    latents = []
    for begin in range(0, count, evaluate.BATCH):
        rows = slice(begin, begin + evaluate.BATCH)
        words = captions[rows]
        short = [f"a {NUMBERS[digit]}" for digit in wanted[rows, 0].tolist()]
        noise = torch.randn(len(words), 16, 8, 8, generator=generator)
        latents.append(sampled(pair, way, models, words, short, noise))
    reader, autoencoder = loader.load_judge(), loader.load_autoencoder()
    with torch.inference_mode():
        images = torch.cat([autoencoder.decode(part).clamp(0, 1) for part in latents])
        answers, features = reader(images), reader.features(images)
    odds = {name: answers[name].log_softmax(1) for name in judge.HEADS}
    each = [odds[n].gather(1, wanted[:, i : i + 1])[:, 0] for i, n in enumerate(judge.HEADS) if n in
            ("digit", "ink", "paper")]  # fmt: skip
    bold = answers["weight"].argmax(1) == BOLD
    return Found(
        evaluate.prompt_share(answers, wanted),
        float(bold.float().mean()),
        judge.frechet_distance(features, reference),
        torch.stack(each).sum(0) + pair.boldness * odds["weight"][:, BOLD],
        images,
    )


def wins(ours: Tensor, theirs: Tensor, target: float | None = None) -> Figure:
    """Share of pictures with the higher verdict, ties half, and its 95 % interval (normal approximation)."""
    share = float(((ours > theirs).float() + 0.5 * (ours == theirs).float()).mean())
    wide = 1.96 * (share * (1 - share) / len(ours)) ** 0.5
    return Figure(share, target=target, better="higher", interval=(share - wide, share + wide))


def quality(report: Report, pairs: dict[str, Pair], count: int) -> list[Tensor]:
    """Fill the report with every pair and way; the first eight images of each."""
    models, reference, shown = Models(), evaluate.reference(), []
    for name, pair in pairs.items():
        found = {way: measure(pair, way, models, count, reference) for way in WAYS}
        for way, one in found.items():
            report.figures[f"{name}, {way}: prompt right"] = Figure(one.prompt, better="higher")
            report.figures[f"{name}, {way}: Fréchet distance"] = Figure(one.frechet)
            if pair.boldness:
                report.figures[f"{name}, {way}: bold"] = Figure(one.bold, better="higher")
            shown.append(one.images[:8])
        for way, target in (("plain", 0.75), ("field", None), ("equal calls", 0.5)):
            figure = wins(found["reflected"].score, found[way].score, target)
            report.figures[f"{name}: reflected wins against {way}"] = figure
    return shown


def in_comfyui(path: Path, pairs: int) -> dict[str, Figure]:
    """The timings, taken inside ComfyUI's process."""
    times = inside("reflection_comfyui", path, pairs)
    return {
        "in ComfyUI: cfg pair over core KSampler euler, per call": ratio(times["cfg"], times["core"], 1.02),
        "in ComfyUI: LoRA pair over cfg pair": ratio(times["lora"], times["cfg_again"], 1.05),
    }


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="write a contact sheet of every row")
    options = parser.parse_args()
    report = Report("reflection")
    rows = quality(report, PAIRS, 64 if options.quick else 512)
    given = os.environ.get("COMFYUI_PATH")
    if given:
        report.figures |= in_comfyui(Path(given).resolve(), 9 if options.quick else 31)
    if options.sheet:
        watch.save_sheet(torch.cat(rows).movedim(1, -1), options.sheet)
    finish(report, options)


if __name__ == "__main__":
    main()
