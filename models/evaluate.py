"""Figures of the embedded models: Fréchet distance to held-out digits, prompt accuracy and time, by number of calls."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from ..sampling.distilled import Mode
from . import digits, judge, loader, twins

BATCH = 32


@dataclass(frozen=True)
class Figures:
    """calls of the network per image, seconds per image, Fréchet distance, share of right answers per attribute.

    `prompt` is the share of images whose digit and both colours are what the prompt says.
    """

    calls: int
    seconds: float
    frechet: float
    prompt: float
    attributes: dict[str, float]


def requests(count: int, seed: int) -> tuple[list[str], torch.Tensor]:
    """Full captions and their attributes (count, 5) in judge.HEADS' order; only colours that can be told apart."""
    generator = torch.Generator().manual_seed(seed)
    pair = torch.tensor(digits.PAIRS)[torch.randint(len(digits.PAIRS), (count,), generator=generator)]
    rest = [torch.randint(judge.HEADS[n], (count,), generator=generator) for n in ("digit", "weight", "slant")]
    values = torch.stack([rest[0], pair[:, 0], pair[:, 1], *rest[1:]], 1)
    return [digits.describe(*row)[0] for row in values.tolist()], values


@cache
def reference(count: int = 2048, seed: int = 360) -> torch.Tensor:
    """Judge features (count, 64) of digits drawn from the held-out split; drawn once, so nobody may write to them."""
    fields, labels = digits.load("held_out")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(labels), (count,), generator=generator)
    reader = loader.load_judge()
    with torch.inference_mode():
        parts = [reader.features(digits.draw(fields[c], labels[c], generator).image) for c in chosen.split(4 * BATCH)]
    return torch.cat(parts)


def recall(features: torch.Tensor, real: torch.Tensor, k: int = 3) -> float:
    """Share of the real features (M, F) that lie within the k-th neighbour's distance of some sample (N, F).

    Improved recall, Kynkäänniemi et al. 2019 (arXiv 1904.06991), eq. 2.
    """
    reach = torch.cdist(features, features).kthvalue(k + 1, dim=1).values
    return float((torch.cdist(real, features) <= reach[None]).any(1).float().mean())


def prompt_share(answers: dict[str, torch.Tensor], wanted: torch.Tensor) -> float:
    """Share of images whose digit and both colours are what was asked for; wanted (N, 5) in judge.HEADS' order."""
    right = {name: answers[name].argmax(1) == wanted[:, i] for i, name in enumerate(judge.HEADS)}
    return float((right["digit"] & right["ink"] & right["paper"]).float().mean())


def floor(count: int) -> float:
    """Fréchet distance of `count` drawn held-out digits to the reference: what few samples cost by themselves."""
    return judge.frechet_distance(reference(count, seed=count), reference())


@torch.inference_mode()
def figures(
    kind: str,
    network: nn.Module,
    steps: int,
    *,
    student: Mode | None = None,
    count: int,
    seed: int = 0,
    cfg: float = twins.GUIDANCE,
) -> tuple[Figures, torch.Tensor]:
    """Sample `count` images with a twin (guided, DPM-Solver++) or a student of it (1 or 4 calls); figures and images.

    network: diffusers' SD3 transformer. student: how it goes from level to level, None for the twin itself. Images
    (count, 3, 64, 64) in [0, 1].
    """
    prompts, autoencoder, reader = (
        twins.Prompts(loader.load_text_encoder()),
        loader.load_autoencoder(),
        loader.load_judge(),
    )
    captions, wanted = requests(count, seed)
    generator = torch.Generator().manual_seed(seed)
    uncond = prompts.encode([""])
    images, spent = [], 0.0
    for begin in range(0, count, BATCH):
        words = captions[begin : begin + BATCH]
        noise = torch.randn(len(words), 16, 8, 8, generator=generator)
        began = time.perf_counter()
        cond = prompts.encode(words)
        latent = (
            twins.study(twins.Denoiser(kind, network, cond), noise, steps, student)
            if student is not None
            else twins.teach(twins.Denoiser(kind, network, cond, uncond, cfg), noise, steps)
        )
        images.append(autoencoder.decode(latent).clamp(0, 1))
        spent += time.perf_counter() - began
    image = torch.cat(images)
    answers = reader(image)
    right = {name: answers[name].argmax(1) == wanted[:, i] for i, name in enumerate(judge.HEADS)}
    return (
        Figures(
            calls=steps,
            seconds=spent / count,
            frechet=judge.frechet_distance(reader.features(image), reference()),
            prompt=prompt_share(answers, wanted),
            attributes={name: float(value.float().mean()) for name, value in right.items()},
        ),
        image,
    )
