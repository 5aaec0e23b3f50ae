"""What `benchmarks.preference` teaches and asks: a taste, pairs that the judge labels, trainings, and their pictures.

The taste is bold strokes and warm ink (red, orange or yellow). Prompts name a digit, a paper of another colour and
perhaps a slant, so that neither is in their words: 160 are trained on, 40 are held out. The score is the judge's log
p(digit) + log p(paper) + log p(bold) + log p(warm ink); it labels the pairs, is the reward of what learns from one, and
says who wins. Pictures are sampled by DPM-Solver++(2M) with guidance; a prompt's n-th picture has the same noise in
every model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.atomic import write_json
from ..hosts.headless import embedded
from ..hosts.headless.folders import Folders, use
from ..hosts.headless.host import host
from ..hosts.training import run as training
from ..models import digits, evaluate, judge, loader, twins
from ..models.reward import BOLD, judge_reward
from ..rewards.combine import Combined, Term
from ..rewards.contract import Holder
from ..rewards.scoring import score
from ..sampling.accounts import seed_of
from ..trainers.dataset import Dataset, entries_of
from ..trainers.methods import read_config
from ..trainers.watch import METRICS, read_metrics
from .distillation import Shown

WARM = tuple(digits.COLOURS.index(name) for name in ("red", "orange", "yellow"))
PAPERS = ("black", "white", "green", "blue", "purple")
SLANTS = ("", ", leaning left", ", upright", ", leaning right")
HELD_OUT, PAIRS, SEED = 40, 500, 0
STEPS, CFG = 12, 3.0


@cache
def prompts() -> tuple[list[str], list[str]]:
    """(trained on, held out): every digit on every paper with every slant, shared out at random."""
    words = [f"a {n} on {p} paper{s}" for n in digits.NUMBERS for p in PAPERS for s in SLANTS]
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(SEED)).tolist()
    return [words[i] for i in order[HELD_OUT:]], [words[i] for i in order[:HELD_OUT]]


@dataclass(eq=False)
class WarmInk:
    """log p(red, orange or yellow ink) by the judge."""

    holder: Holder
    name: str = "warm ink"
    differentiable: bool = True
    range: tuple[float, float] = (-math.inf, 0.0)

    def __call__(self, images: Tensor, prompts: str | Sequence[str]) -> Tensor:
        """(B,) fp32."""
        answers = self.holder.network(images.to(self.holder.load()).movedim(-1, 1).float())
        return answers["ink"].log_softmax(-1)[:, list(WARM)].logsumexp(-1).to(images.device)


@cache
def taste() -> Combined:
    """The score."""
    terms = (judge_reward(host.hold, boldness=1.0), WarmInk(host.hold(loader.load_judge())))
    return Combined(tuple(Term(reward) for reward in terms), name="bold and warm")


@dataclass(frozen=True)
class Run:
    """One LoRA: of which twin, by which method; settings beside the common ones; share of pairs that are turned."""

    kind: str
    method: str
    objective: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    turned: float = 0.0

    def config(self) -> dict[str, Any]:
        """As a job spells it."""
        return {
            "method": self.method, "objective": self.objective,
            "training": {**COMMON, "learning_rate": RATES[self.kind], **self.training}, "lora": {"rank": 16},
        }  # fmt: skip


COMMON = {
    "batch_size": 8, "steps": 150, "warmup": 10, "preview_every": 0, "save_every": 15,
    "save_minutes": 0, "keep": 1000, "prompt_dropout": 0.1, "seed": SEED, "gradient_checkpointing": False,
}  # fmt: skip


RATES = {"flow": 4e-4, "eps": 2e-4}  # pairs at 4e-4 made the eps twin forget its digits
ONLINE = {"learning_rate": 4e-4, "steps": 60, "prompt_dropout": 0.0}
GROUPS = {**ONLINE, "learning_rate": 1e-3, "steps": 120, "batch_size": 2}
RUNS = {
    "dpo": Run("flow", "dpo", {"beta": 100.0}),
    "smpo": Run("flow", "smpo", {"beta": 10.0, "temperature": 4.0}, {"steps": 75}),
    "mapo": Run("flow", "mapo", {}, {"learning_rate": 2e-4, "batch_size": 16}),
    "dpo_turned": Run("flow", "dpo", {"beta": 100.0}, turned=0.1),
    "align_prop": Run("flow", "align_prop", {"steps": 10, "cfg": 3.0}, ONLINE),
    "spo": Run("flow", "spo", {"steps": 10, "cfg": 1.0}, ONLINE),
    "flow_grpo": Run("flow", "flow_grpo", {"steps": 10, "cfg": 1.0, "trained": 3}, GROUPS),
}


def network(kind: str, lora: Path | None) -> torch.nn.Module:
    """The twin, with a LoRA's file in its weights."""
    loras = () if lora is None else ((loader.read_state(lora), 1.0),)
    return loader.load_transformer(kind, loras).network


@torch.no_grad()
def latents(kind: str, lora: Path | None, words: list[str], seeds: list[int]) -> Tensor:
    """Model latents (N, 16, 8, 8), one of each prompt with its seed."""
    encoder = twins.Prompts(loader.load_text_encoder())
    empty, net, made = encoder.encode([""]), network(kind, lora), []
    for begin in range(0, len(words), evaluate.BATCH):
        part = list(zip(words, seeds, strict=True))[begin : begin + evaluate.BATCH]
        noise = torch.stack([
            torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(seed_of("preference", *one))) for one in part
        ])  # fmt: skip
        denoiser = twins.Denoiser(kind, net, encoder.encode([word for word, _ in part]), empty, CFG)
        made.append(twins.teach(denoiser, noise, STEPS))
    return torch.cat(made)


@torch.no_grad()
def judged(found: Tensor, words: list[str]) -> dict[str, Tensor]:
    """What the judge sees in model latents: "score", "bold", "warm" (N,), "features" (N, 64), "image" (N, 3, 64, 64),
    and the classes of its heads."""
    image = torch.cat([loader.load_autoencoder().decode(part).clamp(0, 1) for part in found.split(4 * evaluate.BATCH)])
    reader = loader.load_judge()
    answers = {name: logits.argmax(1) for name, logits in reader(image).items()}
    return {
        "score": score(taste(), image.movedim(1, -1), words),
        "bold": answers["weight"] == BOLD,
        "warm": torch.isin(answers["ink"], torch.tensor(WARM)),
        "features": reader.features(image),
        "image": image,
        **answers,
    }


def pairs(kind: str, work: Path) -> Dataset:
    """Two pictures of each of 500 prompts by the base, the better one first; made once."""
    path = work / f"pairs_{kind}.safetensors"
    if not path.is_file():
        words = [prompts()[0][i % len(prompts()[0])] for i in range(PAIRS)]
        both = [latents(kind, None, words, [2 * i + side for i in range(PAIRS)]) for side in range(2)]
        scores = torch.stack([judged(each, words)["score"] for each in both])
        stored = [embedded.LATENT.process_out(each) for each in both]
        clip = host.embedded(kind)[1]
        first = (scores[0] >= scores[1]).tolist()
        data = Dataset(
            entries_of([clip.encode(word) for word in words], "prompt"), words,
            entries_of([clip.encode("")], "prompt")[0],
            [stored[0 if won else 1][i] for i, won in enumerate(first)], None,
            [stored[1 if won else 0][i] for i, won in enumerate(first)], (scores[0] - scores[1]).abs().tolist(),
        )  # fmt: skip
        work.mkdir(parents=True, exist_ok=True)
        data.save(path)
    return Dataset.load(path)


def turned(data: Dataset, share: float) -> Dataset:
    """The same pairs, a share of them the wrong way round."""
    count = round(share * len(data.prompts))
    wrong = set(torch.randperm(len(data.prompts), generator=torch.Generator().manual_seed(SEED))[:count].tolist())
    assert data.latents is not None and data.losers is not None
    both = list(zip(data.latents, data.losers, strict=True))
    swapped = [(b, a) if i in wrong else (a, b) for i, (a, b) in enumerate(both)]
    winners, losers = (list(side) for side in zip(*swapped, strict=True))
    return Dataset(data.entries, data.prompts, data.negative, winners, None, losers, data.strengths)


def asked(kind: str) -> Dataset:
    """The training prompts alone, for what learns from the score."""
    clip, words = host.embedded(kind)[1], prompts()[0]
    negative = entries_of([clip.encode("")], "prompt")[0]
    return Dataset(entries_of([clip.encode(word) for word in words], "prompt"), words, negative, None, (16, 8, 8))


REWARDED = ("align_prop", "spo", "flow_grpo")


def train(name: str, run: Run, work: Path) -> Path:
    """Train, or go on with a training that was stopped; the run's folder, whose checkpoints are named by their step."""
    folder = work / name.replace(" ", "_")
    if (folder / "time.json").is_file():
        return folder
    model, _, vae = host.embedded(run.kind)
    rewarded = run.method in REWARDED
    data = asked(run.kind) if rewarded else turned(pairs(run.kind, work), run.turned)
    request = training.Request(name.replace(" ", "_"), read_config(run.config()), data)
    began = time.monotonic()
    with use(Folders(models=(work,), output=work)):
        training.run(
            host, model, request, watcher=Shown(name), vae=vae, reward=taste() if rewarded else None, folder=folder
        )
    write_json(folder / "time.json", {"seconds": time.monotonic() - began})
    return folder


def checkpoint(folder: Path, step: int) -> Path:
    """The LoRA after so many steps."""
    return folder / "checkpoints" / f"step_{step:07d}.safetensors"


def seconds(folder: Path) -> float:
    """What the steps of a training took."""
    return sum(row["seconds"] for row in read_metrics(folder / METRICS))


@cache
def reference(count: int = 1024) -> Tensor:
    """Judge features (count, 64) of drawn held-out digits with bold strokes, warm ink and these papers."""
    fields, labels = digits.load("held_out")
    generator = torch.Generator().manual_seed(360)
    reader, papers, found, so_far = loader.load_judge(), torch.tensor([digits.COLOURS.index(p) for p in PAPERS]), [], 0
    while so_far < count:
        chosen = torch.randint(len(labels), (512,), generator=generator)
        batch = digits.draw(fields[chosen], labels[chosen], generator)
        kept = (batch.weight == BOLD) & torch.isin(batch.ink, torch.tensor(WARM)) & torch.isin(batch.paper, papers)
        with torch.inference_mode():
            found.append(reader.features(batch.image[kept]))
        so_far += int(kept.sum())
    return torch.cat(found)[:count]


def wanted(words: list[str]) -> Tensor:
    """(N, 2) classes of digit and paper that prompts name."""
    from ..models import reward

    asks = [reward.wanted(word) for word in words]
    return torch.tensor([[ask["digit"], ask["paper"]] for ask in asks])


def variety(features: Tensor, per_prompt: int) -> float:
    """Mean distance of two pictures of one prompt in the judge's features (N, 64), N in groups of per_prompt."""
    groups = features.view(-1, per_prompt, features.shape[1])
    return float(torch.stack([torch.pdist(group).mean() for group in groups]).mean())


def frechet(features: Tensor) -> float:
    """Fréchet distance (see `models.judge`) to what the taste wants."""
    return judge.frechet_distance(features, reference())
