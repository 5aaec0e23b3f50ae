"""Build the photograph model: `python -m retort.models.build_photos [--work DIR] [--only STEP] [--out DIR]`.

Steps, in order: teacher, pairs, regression, restorer, baseline, eye, export. Each is seeded, resumes where it was
stopped and is skipped when it is finished. About an hour on one core; what came of it is in README.md beside this file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..trainers import files
from . import photographs
from .photo_network import PhotoText, PhotoTokenizer, new_network
from .training import Schedule, train

BATCH = 16
SIDE = 48
PAIRS = 6144
LEVEL = 0.4  # the restorer's only call: InstaRevive's t = 400
SCHEDULES = {
    "teacher": Schedule(2000, rate=1e-3, warmup=100, decay=0.5, ema=0.998),
    "regression": Schedule(1500, rate=6e-4, warmup=100, decay=0.5, ema=0.997),
}


class Model(nn.ModuleDict):
    """The network and the text encoder that it learns with."""

    def __init__(self):
        super().__init__({"network": new_network().to(memory_format=torch.channels_last), "text": PhotoText()})

    def told(self, captions: list[str]) -> Tensor:
        """Captions to what the network is told (B, WIDTH)."""
        ids, weights = zip(*map(PhotoTokenizer().encode, captions), strict=True)
        return self["text"](torch.tensor(ids), torch.tensor(weights))[1]


def build_teacher(work: Path) -> Model:
    """Flow matching on patches: x_t = (1 - t) x0 + t n, the network predicts n - x0."""
    torch.manual_seed(41)
    model = Model()

    def loss(generator: torch.Generator) -> Tensor:
        drawn = [photographs.patch(generator, SIDE) for _ in range(BATCH)]
        x0 = torch.stack([image for image, _ in drawn]) * 2 - 1
        told = model.told([photographs.said(generator, chosen) for _, chosen in drawn])
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.sigmoid(1.2 * torch.randn(BATCH, generator=generator))
        level = t[:, None, None, None]
        x = ((1 - level) * x0 + level * noise).to(memory_format=torch.channels_last)
        return (model["network"](x, 1000 * t, told) - (noise - x0)).square().mean()

    return train("teacher", model, loss, SCHEDULES["teacher"], 41, work)


def build_pairs(work: Path) -> dict[str, Tensor]:
    """Patches and their degraded twins, drawn once."""
    path = work / "pairs.safetensors"
    if not path.exists():
        files.write_atomically(path, files.tensors(photographs.pairs(PAIRS, 42)))
    return load_file(path)


def drawn_pairs(rows: dict[str, Tensor], generator: torch.Generator, count: int) -> tuple[Tensor, Tensor, list[str]]:
    """(clean, degraded) latents (count, 3, SIDE, SIDE) and captions, cut and turned at random."""
    chosen = torch.randint(len(rows["clean"]), (count,), generator=generator)
    both = torch.stack([rows["clean"][chosen], rows["degraded"][chosen]], 1).float() / 127.5 - 1
    cut = []
    for pair in both:
        top, left, way = (int(torch.randint(n, (), generator=generator)) for n in (*[pair.shape[-1] - SIDE + 1] * 2, 8))
        cut.append(photographs.turned(pair[..., top : top + SIDE, left : left + SIDE], way))
    clean, degraded = (part.contiguous(memory_format=torch.channels_last) for part in torch.stack(cut, 1))
    return clean, degraded, [photographs.said(generator, int(which)) for which in rows["photograph"][chosen]]


def regression_loss(model: Model, rows: dict[str, Tensor]):
    """Mean distance of the one-call output from the clean patch, as a function of a generator."""

    def loss(generator: torch.Generator) -> Tensor:
        clean, degraded, captions = drawn_pairs(rows, generator, BATCH)
        velocity = model["network"](degraded, torch.full((BATCH,), 1000 * LEVEL), model.told(captions))
        error = degraded - LEVEL * velocity - clean
        return (error.square() + 1e-4).sqrt().mean()

    return loss


def build_regression(work: Path) -> Model:
    """The restorer's start: from the teacher's weights, regression alone."""
    model = build_teacher(work)
    model["text"].requires_grad_(False)
    return train("regression", model, regression_loss(model, build_pairs(work)), SCHEDULES["regression"], 43, work)


def main() -> None:
    """Command line of the build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/photos"), help="folder of resumable training state")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder that receives the weights")
    actions = {
        "teacher": build_teacher,
        "pairs": build_pairs,
        "regression": build_regression,
    }
    parser.add_argument("--only", choices=actions, help="run one step (and what it needs)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    for step in [options.only] if options.only else actions:
        actions[step](options.work)


if __name__ == "__main__":
    main()
