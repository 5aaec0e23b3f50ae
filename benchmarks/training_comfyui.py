"""Step times of trainings of one network inside ComfyUI: ours, core's TrainLoraNode, a bare loop with PEFT.

`python -m retort.benchmarks.training_comfyui CHECKOUT PAIRS NAME [streamed]` prints one JSON line;
`benchmarks.training` starts it. NAME: one of `layouts.TINY`, whose weights are random, or "embedded model". All train
LoRAs of rank 8 with AdamW in fp32, batch 4, without checkpoints but on Flux, whose backward pass fails in core's
trainer when they are off. Ours and the bare loop adapt the linear and convolution layers under one loss; core adapts
whatever it adapts, in x0. They take turns after every step, and what is counted is the processor's time, of all
threads: other work may run beside.

streamed: ours copies every block of the base for each pass, as it does to a card, with checkpoints; core trains in its
mode `offloading`, with its checkpoints. On a processor that mode moves nothing.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .layouts import TINY, Layout

WARM = 4  # steps of each that do not count: allocations, optimiser state
STEPS = 5  # of each to a pair
BATCH, RANK, IMAGES, RATE = 4, 8, 16, 1e-3
EMBEDDED = "embedded model"
NAMES = (*TINY, EMBEDDED)
ALL = "99999"  # blocks: more than any network has


class Turn(threading.Thread):
    """A training that stands still after every step until it is its turn again; seconds: processor's, of each turn."""

    def __init__(self, train: Callable[[Callable[[], None]], None]):
        super().__init__(daemon=True)
        self._train, self._go, self._back = train, threading.Semaphore(0), threading.Semaphore(0)
        self.seconds: list[float] = []
        self.error: BaseException | None = None
        self._ended = False
        self.start()

    def run(self) -> None:
        """Train; the first turn begins with the set-up, the last one is the work after the last step."""
        self._go.acquire()
        self._began = time.process_time()
        try:
            self._train(self._stepped)
        except BaseException as error:
            self.error = error
        self._ended = True
        self._back.release()

    def _stepped(self) -> None:
        self.seconds.append(time.process_time() - self._began)
        self._back.release()
        self._go.acquire()
        self._began = time.process_time()

    def take(self) -> None:
        """One turn; raises what the training raised."""
        if not self._ended:
            self._go.release()
            self._back.acquire()
        if self.error is not None:
            raise self.error


def in_turns(trainings: list[Callable[[Callable[[], None]], None]], steps: int) -> list[list[float]]:
    """Seconds of each training's steps; each is called with what it is to call after a step, and makes `steps`."""
    turns = [Turn(train) for train in trainings]
    for i in range(steps + 1):  # the last one ends them
        first = i % len(turns)
        for turn in turns[first:] + turns[:first]:
            turn.take()
    if any(len(turn.seconds) != steps for turn in turns):
        raise RuntimeError(f"{steps} steps each were expected, and {[len(turn.seconds) for turn in turns]} were made")
    return [turn.seconds for turn in turns]


class Trainings:
    """One network file, one data set, and the ways to train on them."""

    def __init__(self, folder: Path, name: str, steps: int, streamed: bool = False):
        self.utils = importlib.import_module("comfy.utils")
        self.core_node = importlib.import_module("comfy_extras.nodes_train").TrainLoraNode
        self.name, self.steps, self.streamed = name, steps, streamed
        self.checkpoints = streamed or name == "Flux"
        self.layout = Layout("SD3", {}, (16, 8, 8), (16, 128), 128) if name == EMBEDDED else TINY[name]
        self.file = folder / "network.safetensors"
        if name != EMBEDDED:
            self.layout.write(self.file)
        generator = torch.Generator().manual_seed(0)
        self.latents = self.layout.latents(IMAGES, generator)
        self.entries = [self.layout.conditioning(generator) for _ in self.latents]
        self.shares: list[float] = []

    def model(self) -> Any:
        """The MODEL, read anew."""
        if self.name != EMBEDDED:
            return self.layout.load(self.file)
        with torch.inference_mode():
            return importlib.import_module("..hosts.comfyui.embedded", __package__).load("flow")[0]

    def ours(self, stepped: Callable[[], None]) -> None:
        """`hosts.training.run.run`, as the node calls it."""
        from ..hosts.comfyui.host import host
        from ..hosts.training import run as training
        from ..trainers.adapters import LoraConfig
        from ..trainers.config import RunConfig, TrainingConfig
        from ..trainers.dataset import Dataset
        from ..trainers.objectives.flow_matching import FlowMatchingConfig
        from ..trainers.watch import METRICS, read_metrics

        class Stamped(training.HostWatcher):
            def step(self, done, total, metrics):
                super().step(done, total, metrics)
                stepped()

        settings = TrainingConfig(
            steps=self.steps,
            batch_size=BATCH,
            learning_rate=RATE,
            precision="fp32",
            preview_every=0,
            save_every=0,
            keep=0,
            gradient_checkpointing=self.checkpoints,
            offload=ALL if self.streamed else "none",
        )
        config = RunConfig("flow", FlowMatchingConfig(), settings, LoraConfig(RANK))
        dataset = Dataset(list(self.entries), ["a prompt"] * IMAGES, latents=list(self.latents))
        request = training.Request("ours", config, dataset)
        with torch.inference_mode():
            done = training.run(host, self.model(), request, watcher=Stamped(host, self.steps))
        self.shares += [row["data"] for row in read_metrics(done.folder / METRICS)[WARM:]]

    def core(self, stepped: Callable[[], None]) -> None:
        """TrainLoraNode."""
        mine = threading.current_thread()

        def progressed(*_: Any, **__: Any) -> None:
            if threading.current_thread() is mine:
                stepped()

        settings = {
            "batch_size": BATCH, "steps": self.steps, "grad_accumulation_steps": 1, "learning_rate": RATE, "rank": RANK,
            "optimizer": "AdamW", "loss_function": "MSE", "seed": 1, "training_dtype": "fp32", "lora_dtype": "fp32",
            "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": self.checkpoints,
            "checkpoint_depth": 1, "offloading": self.streamed, "existing_lora": "[None]", "bucket_mode": False,
            "bypass_mode": False,
        }  # fmt: skip
        self.utils.set_progress_bar_global_hook(progressed)
        try:
            with torch.inference_mode():
                self.core_node.execute(
                    model=[self.model()],
                    latents=[{"samples": latent[None]} for latent in self.latents],
                    positive=[[[tokens, dict(extra)]] for tokens, extra in self.entries],
                    **{name: [value] for name, value in settings.items()},
                )
        finally:
            self.utils.set_progress_bar_global_hook(None)

    def bare(self, stepped: Callable[[], None]) -> None:
        """Nothing but a network of SD3's layout, its adapters and an optimiser."""
        from peft import LoraConfig, inject_adapter_in_model

        load: Any = importlib.import_module("comfy.sd").load_diffusion_model
        network = load(str(self.file)).model.diffusion_model.requires_grad_(False)
        kinds = (torch.nn.Linear, torch.nn.Conv2d)
        layers = [name for name, module in network.named_modules() if isinstance(module, kinds)]
        inject_adapter_in_model(LoraConfig(r=RANK, target_modules=layers), network)
        latents = torch.stack(self.latents)
        context = torch.cat([tokens for tokens, _ in self.entries])
        pooled = torch.cat([extra["pooled_output"] for _, extra in self.entries])
        optimiser = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], RATE, fused=True)
        for _ in range(self.steps):
            chosen, sigma = torch.randint(0, IMAGES, (BATCH,)), torch.rand(BATCH)
            x0, s = latents[chosen], sigma[:, None, None, None]
            noise = torch.randn_like(x0)
            v = network((1 - s) * x0 + s * noise, 1000 * sigma, context=context[chosen], y=pooled[chosen])
            (v - (noise - x0)).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
            stepped()


def main(checkout: Path, pairs: int, name: str, streamed: bool) -> None:
    """Measure inside ComfyUI; see the module."""
    sys.path.insert(0, str(checkout))
    importlib.import_module("comfy.options")
    arguments: Any = importlib.import_module("comfy.cli_args").args
    with tempfile.TemporaryDirectory() as folder:
        arguments.cpu, arguments.base_directory = True, folder
        utils: Any = importlib.import_module("comfy.utils")
        utils.PROGRESS_BAR_ENABLED = False
        # Every step of core's is to be heard of.
        utils.PROGRESS_THROTTLE_MIN_INTERVAL = utils.PROGRESS_THROTTLE_MIN_PERCENT = 0
        trainings = Trainings(Path(folder), name, WARM + pairs * STEPS, streamed)
        ways = {"ours": trainings.ours, "core": trainings.core}
        if name.startswith("SD3") and not streamed:
            ways["bare"] = trainings.bare
        found = in_turns(list(ways.values()), trainings.steps)
    result: dict[str, list[float]] = {"data": trainings.shares}
    for way, seconds in zip(ways, found, strict=True):
        result[way] = [sum(seconds[i : i + STEPS]) for i in range(WARM, trainings.steps, STEPS)]
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), sys.argv[3], "streamed" in sys.argv[4:])
