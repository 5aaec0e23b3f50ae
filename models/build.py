"""Build every embedded weight from scratch: `python -m retort.models.build [--work DIR] [--only STEP] [--out DIR]`.

Steps, in order: judge, text, autoencoder, decoder, latents, flow, eps, export, statistics, captioner. Each is seeded,
resumes where it was stopped, and is skipped when it is finished. Under three hours on two cores; what came of it is in
README.md beside this file. The students are made after it, by
`python -m retort.benchmarks.distillation --train --ship`, the restorers by
`python -m retort.benchmarks.restoration --train --ship`.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from tqdm import trange

from ..files import atomic as files
from ..restoration.spoil import Spoiling
from ..sampling.teleport import low_rank
from . import digits, export, judge, layout, loader, text, twins
from .autoencoder import NARROW, Autoencoder
from .training import Schedule, channels_last, train

BATCH = 64
LATENTS = 32768
DIRECTIONS = 32
SCHEDULES = {
    "judge": Schedule(1500, rate=2e-3),
    "text": Schedule(800, rate=2e-3),
    "autoencoder": Schedule(1600, rate=3e-3, decay=0.5),
    "decoder": Schedule(1800, rate=1.5e-3, decay=0.6),
    "flow": Schedule(7000, rate=8e-4, warmup=200, ema=0.9995, keep=(1500,)),
    "eps": Schedule(7000, rate=8e-4, warmup=200, ema=0.9995, keep=(1500,)),
    "eps_refined": Schedule(2800, rate=6e-4, decay=0.5, ema=0.998),
    "captioner": Schedule(900, rate=1e-3, decay=0.6, ema=0.99),
}
STEPS = ("judge", "text", "autoencoder", "decoder", "latents", "flow", "eps", "export", "statistics", "captioner")
# How the digits are damaged that captioner and restorers learn from: up to beyond recognition.
DAMAGE = Spoiling("real_world", 0.3, 1.0, 2.0, 8.0)


@functools.cache
def training_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The training split, read once."""
    return digits.load("train")


def drawn(generator: torch.Generator, count: int) -> digits.Digits:
    """A batch of freshly drawn training digits."""
    fields, labels = training_digits()
    chosen = torch.randint(len(labels), (count,), generator=generator)
    return digits.draw(fields[chosen], labels[chosen], generator)


def build_judge(work: Path) -> judge.Judge:
    """Train the judge on drawn digits, softened now and then so that a decoder's blur does not fool it."""
    torch.manual_seed(1)
    model = judge.Judge()

    def loss(generator: torch.Generator) -> torch.Tensor:
        batch = drawn(generator, BATCH)
        image = batch.image
        if torch.rand((), generator=generator) < 0.4:
            image = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        image = image + 0.04 * torch.randn(image.shape, generator=generator) * torch.rand((), generator=generator)
        return judge.loss(model, digits.Digits(image, *(getattr(batch, n) for n in judge.HEADS)))

    return train("judge", model, loss, SCHEDULES["judge"], 1, work)


class Reader(nn.Module):
    """Text encoder with heads: the pooled state names every attribute the caption mentions, each token its own word."""

    def __init__(self):
        super().__init__()
        self.encoder = text.TextEncoder()
        self.words = nn.Linear(text.WIDTH, text.SIZE)
        self.heads = nn.ModuleDict({n: nn.Linear(text.WIDTH, k + 1) for n, k in judge.HEADS.items()})


def build_text(work: Path) -> text.TextEncoder:
    """Train the text encoder to keep every word and to pool what the caption says (or that it does not say it)."""
    torch.manual_seed(2)
    model, tokenizer = Reader(), text.WordTokenizer()

    def loss(generator: torch.Generator) -> torch.Tensor:
        values = torch.stack([torch.randint(k, (256,), generator=generator) for k in judge.HEADS.values()])
        captions = [digits.described(row, generator) for row in values.T.tolist()]
        ids = tokenizer.batch([words for words, _ in captions])
        tokens, pooled = model.encoder(ids)
        terms = [F.cross_entropy(model.words(tokens).flatten(0, 1), ids.flatten())]
        for name, row in zip(judge.HEADS, values, strict=True):
            said = torch.tensor([name in mentioned for _, mentioned in captions])
            terms.append(F.cross_entropy(model.heads[name](pooled), row.where(said, judge.HEADS[name])))
        return torch.stack(terms).sum()

    return train("text", model, loss, SCHEDULES["text"], 2, work).encoder


def build_autoencoder(work: Path) -> Autoencoder:
    """Train the autoencoder; latents are whitened per channel and slightly noised, to suit a diffusion model."""
    torch.manual_seed(3)
    model = channels_last(Autoencoder(**NARROW))

    def loss(generator: torch.Generator) -> torch.Tensor:
        image = drawn(generator, 16).image.to(memory_format=torch.channels_last)
        z = model.encode(image)
        z = (z - z.mean((0, 2, 3), keepdim=True)) / (z.std((0, 2, 3), keepdim=True) + 1e-3)
        z = z + 0.1 * torch.randn(z.shape, generator=generator)
        error = model.decode(z) - image
        edges = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
        return error.abs().mean() + 2 * error.square().mean() + 0.5 * (edges[0].abs().mean() + edges[1].abs().mean())

    model = train("autoencoder", model, loss, SCHEDULES["autoencoder"], 3, work)
    # Training whitened with batch statistics; here the set's own are folded into the last convolution, once.
    with torch.no_grad():
        z = model.encode(drawn(torch.Generator().manual_seed(31), 1024).image)
        mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
        last: Any = model.taesd_encoder[-1]
        last.weight.div_(std[:, None, None, None])
        last.bias.sub_(mean).div_(std)
    return model


def build_decoder(work: Path) -> Autoencoder:
    """Refine the decoder on the finished encoder's latents; the judge's features add what pixel errors blur away."""
    model, reader = build_autoencoder(work), build_judge(work).requires_grad_(False)
    model.taesd_encoder.requires_grad_(False)

    def loss(generator: torch.Generator) -> torch.Tensor:
        image = drawn(generator, 24).image.to(memory_format=torch.channels_last)
        with torch.no_grad():
            z = model.encode(image)
        out = model.decode(z + 0.08 * torch.randn(z.shape, generator=generator))
        error = out - image
        edges = error[..., 1:] - error[..., :-1], error[..., 1:, :] - error[..., :-1, :]
        pixels = error.abs().mean() + 2 * error.square().mean() + 0.5 * sum(e.abs().mean() for e in edges)
        seen, wanted = out * 2 - 1, image * 2 - 1
        # The first two strides of the judge: strokes and corners, at half and a quarter of the resolution.
        for layer in list(reader.body)[:6]:
            seen, wanted = layer(seen), layer(wanted)
        return pixels + 0.05 * (seen - wanted).abs().mean()

    train("decoder", model.taesd_decoder, loss, SCHEDULES["decoder"], 9, work)
    return model


def build_latents(work: Path) -> dict[str, torch.Tensor]:
    """Encode 32,768 drawn digits with their attributes; the twins never see an image again."""
    path = work / "latents.safetensors"
    if not path.exists():
        encoder = build_autoencoder(work)
        generator = torch.Generator().manual_seed(4)
        rows: dict[str, list[torch.Tensor]] = {"latent": [], **{n: [] for n in judge.HEADS}}
        with torch.inference_mode():
            for _ in trange(LATENTS // 128, desc="latents"):
                batch = drawn(generator, 128)
                rows["latent"].append(encoder.encode(batch.image).half())
                for name in judge.HEADS:
                    rows[name].append(getattr(batch, name))
        files.write_atomically(path, files.tensors({k: torch.cat(v) for k, v in rows.items()}))
    return load_file(path)


def build_twin(kind: str, work: Path, compiled: bool = False) -> nn.Module:
    """Train the flow or the eps twin; compiled, a step takes about a quarter less time."""
    torch.manual_seed(5 if kind == "flow" else 6)
    model = layout.network()
    network = cast(nn.Module, torch.compile(model)) if compiled else model
    loss = twins.loss(kind, network, build_latents(work), build_text(work))
    model = train(kind, model, loss, SCHEDULES[kind], 5 if kind == "flow" else 6, work)
    if kind == "flow":
        return model
    loss = twins.loss(kind, network, build_latents(work), build_text(work), towards_x0=True)
    return train("eps_refined", model, loss, SCHEDULES["eps_refined"], 10, work)


def build_statistics(out: Path) -> None:
    """Gaussian statistics of 2,048 drawn digits in the model's own scale, by the shipped encoder."""
    generator, encoder = torch.Generator().manual_seed(12), loader.load_autoencoder()
    with torch.inference_mode():
        latents = torch.cat([encoder.encode(drawn(generator, 128).image) for _ in trange(16, desc="statistics")])
    files.write_atomically(out / loader.STATISTICS, files.tensors(low_rank(latents, DIRECTIONS).state()))


def build_captioner(work: Path, out: Path) -> None:
    """Teach the shipped judge to read damaged digits too; stroke weight and slant, which damage hides, it forgets."""
    model = loader.load_judge().requires_grad_(True)

    def loss(generator: torch.Generator) -> torch.Tensor:
        batch = drawn(generator, BATCH)
        seeds = torch.randint(2**62, (BATCH,), generator=generator).tolist()
        answers = model(DAMAGE(batch.image.movedim(1, -1), seeds).movedim(-1, 1))
        return torch.stack([F.cross_entropy(answers[n], getattr(batch, n)) for n in ("digit", "ink", "paper")]).sum()

    state = train("captioner", model, loss, SCHEDULES["captioner"], 13, work).state_dict()
    notes = {"modelspec.author": "Retort", "modelspec.license": "Apache-2.0"}
    small = files.tensors({k: v.half() for k, v in state.items()}, notes)
    files.write_atomically(out / loader.CAPTIONER, small)


def main() -> None:
    """Command line of the build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/models"), help="folder of resumable training state")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder that receives the weights")
    parser.add_argument("--only", choices=STEPS, help="run one step (and what it needs)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 leaves torch's own choice")
    parser.add_argument(
        "--compile", action="store_true", help="compile the twins' training step (needs a C++ compiler)"
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    actions = {
        "judge": lambda: build_judge(options.work),
        "text": lambda: build_text(options.work),
        "autoencoder": lambda: build_autoencoder(options.work),
        "decoder": lambda: build_decoder(options.work),
        "latents": lambda: build_latents(options.work),
        "flow": lambda: build_twin("flow", options.work, options.compile),
        "eps": lambda: build_twin("eps", options.work, options.compile),
        "export": lambda: export.write(
            options.work, options.out, build_decoder(options.work),
            {kind: SCHEDULES[kind].keep[0] for kind in ("flow", "eps")},
        ),
        "statistics": lambda: build_statistics(options.out),
        "captioner": lambda: build_captioner(options.work, options.out),
    }
    for step in (options.only,) if options.only else STEPS:
        actions[step]()


if __name__ == "__main__":
    main()
