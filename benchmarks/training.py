"""What training costs: memory of a DMD2 step over a plain one, and in ComfyUI our steps a second over others'.

`python -m retort.benchmarks.training [--quick] [--json FILE]`. Memory counts every tensor byte beyond the base's
weights: activations, adapters, gradients, optimisers, of DMD2 those of both its players. What it takes more is four
times an adapter (the fake score's weights and its optimiser's two averages, and a gradient that waits for the other),
so the ratio falls with the pictures' size and the batch. --quick takes the embedded network in place of larger ones of
SD3's layout. The speeds need COMFYUI_PATH, the folder of a checkout, and run with the packages of the environment that
this is started in.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..hosts.headless import embedded
from ..hosts.headless.families import SD3, as_model, coordinates
from ..hosts.headless.host import host
from ..hosts.headless.model import Model
from ..hosts.training.assembly import add_adapters, encode
from ..trainers.adapters import LoraConfig
from ..trainers.config import RunConfig, TrainingConfig
from ..trainers.dataset import Dataset
from ..trainers.loop import Trainer
from ..trainers.methods import METHODS
from ..trainers.objectives.dmd2 import DMD2Config
from ..trainers.objectives.flow_matching import FlowMatchingConfig
from ..trainers.objectives.parts.contract import LatentReward, Tools
from ..trainers.watch import METRICS, read_metrics
from .report import Figure, Report, arguments, finish
from .timing import ratio
from .training_comfyui import NAMES

METHOD_SETTINGS = {"flow": FlowMatchingConfig(), "dmd2": DMD2Config(ratio=1)}  # so that both players move in a step
MEGABYTE = 2**20


@dataclass
class Peak:
    """Bytes of tensors at their most, beyond those that were there before."""

    bytes: int = 0


@contextmanager
def peak() -> Iterator[Peak]:
    """Watch the tensors that are made inside: torch's allocator on a GPU, its profiler's memory events on a CPU."""
    gc.collect()
    found = Peak()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found.bytes = torch.cuda.max_memory_allocated() - before
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    now = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        found.bytes = max(found.bytes, now)


@dataclass(frozen=True)
class Case:
    """A network and what it is trained on. size: rows and columns of a latent; text: tokens and their width.

    pairs: with a loser to each latent.
    """

    model: Model
    size: int
    text: tuple[int, int]
    pooled: int
    batch: int
    pairs: bool = False

    def dataset(self, count: int = 8) -> Dataset:
        """Random latents and prompts."""
        generator = torch.Generator().manual_seed(0)

        def entry() -> tuple[torch.Tensor, dict[str, Any]]:
            pooled = torch.randn(1, self.pooled, generator=generator)
            return torch.randn(1, *self.text, generator=generator), {"pooled_output": pooled}

        entries, negative = [entry() for _ in range(count)], entry()
        latents, losers = (
            [torch.randn(16, self.size, self.size, generator=generator) for _ in range(count)] for _ in range(2)
        )
        words = ["a prompt"] * count
        if not self.pairs:
            return Dataset(entries, words, negative, latents)
        return Dataset(entries, words, negative, latents, None, losers, [1.0] * count)


def embedded_case(kind: str = "flow") -> Case:
    """A twin."""
    return Case(embedded.load(kind)[0], 8, (16, 128), 128, 4)


def random_case(layers: int, heads: int, size: int, tokens: int, batch: int) -> Case:
    """A transformer of SD3's layout with random weights, 64 wide to a head."""
    import diffusers

    width = 64 * heads

    def build() -> Any:
        torch.manual_seed(0)
        return diffusers.SD3Transformer2DModel(
            sample_size=size, patch_size=2, in_channels=16, num_layers=layers, attention_head_dim=64,
            num_attention_heads=heads, joint_attention_dim=width, caption_projection_dim=width, out_channels=16,
            pooled_projection_dim=width, pos_embed_max_size=size,
        )  # fmt: skip

    def bare() -> torch.nn.Module:
        with torch.device("meta"):
            return build()

    schedule, path, prediction = coordinates(SD3, {}, {})
    return Case(as_model(SD3, build, schedule, path, prediction, bare), size, (tokens, width), width, batch)


def cases(quick: bool) -> dict[str, Case]:
    """The networks whose memory is compared, by what is trained on them.

    Activations and adapters both grow with the width, and the ratio was 1.61 at 512 and at 128 wide: the larger
    pictures go through the narrower network.
    """
    if quick:
        return {"embedded network, batch 4": embedded_case()}
    return {
        "74 M weights, 256 pixels, batch 2": random_case(8, 8, 32, 77, 2),
        "5 M weights, 512 pixels, batch 4": random_case(8, 2, 64, 77, 4),
    }


def train(case: Case, config: RunConfig, folder: Path, reward: LatentReward | None = None) -> Peak:
    """Train from the bare base on, and the peak of its tensors beyond that base."""
    with host.training_session():
        denoiser = host.trainable(case.model)
        try:
            data = encode(denoiser, case.dataset())
            with peak() as found:
                objective = METHODS[config.method].objective(config.objective, denoiser, Tools(reward))
                add_adapters(denoiser, config, objective, None)
                Trainer(denoiser, objective, data, config, folder).train()
        finally:
            denoiser.release()
    return found


def plain_settings(batch: int, steps: int) -> TrainingConfig:
    """Nothing but steps: no previews, no checkpoints; the rest is the default."""
    return TrainingConfig(
        steps=steps, batch_size=batch, warmup=0, precision="fp32", preview_every=0, save_every=0, keep=0,
        gradient_checkpointing=False,
    )


def memory(where: str, case: Case) -> dict[str, Figure]:
    """DMD2 over plain fine-tuning, without and with checkpoints; two steps, so that optimisers have their state."""
    figures = {}
    for checkpoints in (False, True):
        settings = replace(plain_settings(case.batch, 2), gradient_checkpointing=checkpoints)
        found = {}
        for method in METHOD_SETTINGS:
            with tempfile.TemporaryDirectory() as folder:
                config = RunConfig(method, METHOD_SETTINGS[method], settings, LoraConfig())
                found[method] = train(case, config, Path(folder)).bytes
        name = f"memory, {where}, {'with' if checkpoints else 'without'} checkpoints"
        figures[f"{name}: DMD2 step over plain step"] = Figure(found["dmd2"] / found["flow"], target=1.25)
        figures[f"{name}: plain step"] = Figure(found["flow"] / MEGABYTE, "MB")
    return figures


def data_share(case: Case, steps: int) -> Figure:
    """Of a step's time, what goes into fetching its batch; the first steps are left out."""
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig("flow", METHOD_SETTINGS["flow"], plain_settings(case.batch, steps + 4), LoraConfig())
        with host.training_session():
            denoiser = host.trainable(case.model)
            objective = METHODS["flow"].objective(config.objective, denoiser)
            add_adapters(denoiser, config, objective, None)
            Trainer(denoiser, objective, encode(denoiser, case.dataset()), config, Path(folder)).train()
            denoiser.release()
        rows = read_metrics(Path(folder) / METRICS)[4:]
    return Figure(statistics.median(row["data"] for row in rows), target=0.05)


def in_comfyui(checkout: Path, pairs: int, name: str, streamed: bool) -> dict[str, Figure]:
    """The figures that are taken inside ComfyUI's process, of one of `training_comfyui`'s networks."""
    command = [sys.executable, "-m", "retort.benchmarks.training_comfyui", str(checkout), str(pairs), name]
    command += ["streamed"] if streamed else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    measured = json.loads(done.stdout.splitlines()[-1])

    def rate(way: str, target: float) -> Figure:
        return replace(ratio(measured[way], measured["ours"], target), better="higher")

    where = f"in ComfyUI, {name}"
    if streamed:
        return {f"{where}, streamed: our steps a second over core TrainLoraNode's, offloading": rate("core", 1.5)}
    figures = {f"{where}: our steps a second over core TrainLoraNode's": rate("core", 2.0)}
    if "bare" in measured:
        figures[f"{where}: our steps a second over a bare PEFT loop's"] = rate("bare", 0.95)
    return figures | {f"{where}: share of time in data": Figure(statistics.median(measured["data"]), target=0.05)}


def main() -> None:
    """Measure and print."""
    options = arguments(__doc__).parse_args()
    report = Report("training")
    for where, case in cases(options.quick).items():
        report.figures |= memory(where, case)
    report.figures["embedded network: share of time in data"] = data_share(embedded_case(), 10 if options.quick else 50)
    given = os.environ.get("COMFYUI_PATH")
    if given:
        for name in NAMES:
            for streamed in (False, True):
                report.figures |= in_comfyui(Path(given).resolve(), 7 if options.quick else 31, name, streamed)
    finish(report, options)


if __name__ == "__main__":
    main()
