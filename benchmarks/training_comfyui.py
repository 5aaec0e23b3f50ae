"""Step times of three trainings of one network inside ComfyUI: ours, core's TrainLoraNode, a bare loop with PEFT.

`python -m retort.benchmarks.training_comfyui CHECKOUT PAIRS DEPTH` prints one JSON line; `benchmarks.training` starts
it. The network has SD3's layout and random weights; all train LoRAs of rank 8 with AdamW in fp32, batch 4, without
checkpoints. Ours and the bare loop adapt the linear layers under one loss; core adapts whatever it adapts, in x0. They
take turns after every step, so that whatever else the machine does slows all three alike.
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

WARM = 4  # steps of each that do not count: allocations, optimiser state
STEPS = 20  # of each to a pair
BATCH, RANK, IMAGES, RATE, SIDE = 4, 8, 16, 1e-3, 8
TEXT, POOLED = (8, 64), 32


class Turn(threading.Thread):
    """A training that stands still after every step until it is its turn again; seconds: what each turn took."""

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
        self._began = time.perf_counter()
        try:
            self._train(self._stepped)
        except BaseException as error:
            self.error = error
        self._ended = True
        self._back.release()

    def _stepped(self) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        self._back.release()
        self._go.acquire()
        self._began = time.perf_counter()

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
    """One network file, one data set, three ways to train."""

    def __init__(self, folder: Path, depth: int, steps: int):
        import torch
        from safetensors.torch import save_file

        self.torch, self.comfy = torch, importlib.import_module("comfy.sd")
        self.utils = importlib.import_module("comfy.utils")
        self.core_node = importlib.import_module("comfy_extras.nodes_train").TrainLoraNode
        mmdit = importlib.import_module("comfy.ldm.modules.diffusionmodules.mmdit")
        width = 64 * depth
        embedder = {"target": "torch.nn.Linear", "params": {"in_features": TEXT[1], "out_features": width}}
        network = mmdit.OpenAISignatureMMDITWrapper(
            input_size=None, patch_size=2, in_channels=16, depth=depth, adm_in_channels=POOLED, num_patches=256,
            context_embedder_config=embedder, pos_embed_max_size=16, qk_norm="rms", dtype=torch.float32, device="cpu",
            operations=importlib.import_module("comfy.ops").disable_weight_init,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        weights = {}
        for key, value in network.state_dict().items():
            if value.ndim >= 2:
                weights[key] = torch.randn(value.shape, generator=generator) * min(0.2, value[0].numel() ** -0.5)
            else:
                weights[key] = torch.full(value.shape, float(key.endswith(("weight", "scale"))))
        self.file = str(folder / f"sd3_{depth}.safetensors")
        save_file(weights, self.file)
        self.latents = torch.randn(IMAGES, 16, SIDE, SIDE, generator=generator)
        self.context = torch.randn(IMAGES, *TEXT, generator=generator)
        self.pooled = torch.randn(IMAGES, POOLED, generator=generator)
        self.entries = [
            (self.context[i : i + 1], {"pooled_output": self.pooled[i : i + 1]}) for i in range(len(self.latents))
        ]
        self.steps = steps
        self.shares: list[float] = []

    def ours(self, stepped: Callable[[], None]) -> None:
        """`hosts.training.run`, as the node calls it."""
        from ..hosts import training
        from ..hosts.comfyui import host
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
        )
        config = RunConfig("flow", FlowMatchingConfig(), settings, LoraConfig(RANK, convolutions=False))
        dataset = Dataset(list(self.entries), ["a prompt"] * IMAGES, latents=list(self.latents))
        request = training.Request("ours", config, dataset)
        with self.torch.inference_mode():
            model = self.comfy.load_diffusion_model(self.file)
            done = training.run(host, model, request, watcher=Stamped(host, self.steps))
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
            "quantized_backward": False, "algorithm": "LoRA", "gradient_checkpointing": False, "checkpoint_depth": 1,
            "offloading": False, "existing_lora": "[None]", "bucket_mode": False, "bypass_mode": False,
        }  # fmt: skip
        self.utils.set_progress_bar_global_hook(progressed)
        try:
            with self.torch.inference_mode():
                self.core_node.execute(
                    model=[self.comfy.load_diffusion_model(self.file)],
                    latents=[{"samples": latent[None]} for latent in self.latents],
                    positive=[[[tokens, dict(extra)]] for tokens, extra in self.entries],
                    **{name: [value] for name, value in settings.items()},
                )
        finally:
            self.utils.set_progress_bar_global_hook(None)

    def bare(self, stepped: Callable[[], None]) -> None:
        """Nothing but the network, its adapters and an optimiser."""
        from peft import LoraConfig, inject_adapter_in_model

        torch = self.torch
        network = self.comfy.load_diffusion_model(self.file).model.diffusion_model.requires_grad_(False)
        linear = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
        inject_adapter_in_model(LoraConfig(r=RANK, target_modules=linear), network)
        optimiser = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], RATE, fused=True)
        for _ in range(self.steps):
            chosen, sigma = torch.randint(0, IMAGES, (BATCH,)), torch.rand(BATCH)
            x0, noise, s = self.latents[chosen], torch.randn(BATCH, 16, SIDE, SIDE), sigma[:, None, None, None]
            v = network((1 - s) * x0 + s * noise, 1000 * sigma, context=self.context[chosen], y=self.pooled[chosen])
            (v - (noise - x0)).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
            stepped()


def main(checkout: Path, pairs: int, depth: int) -> None:
    """Measure inside ComfyUI; see the module."""
    sys.path.insert(0, str(checkout))
    importlib.import_module("comfy.options")
    arguments: Any = importlib.import_module("comfy.cli_args").args
    with tempfile.TemporaryDirectory() as folder:
        arguments.cpu, arguments.base_directory = True, folder
        utils = importlib.import_module("comfy.utils")
        utils.PROGRESS_BAR_ENABLED = False
        # Every step of core's is to be heard of.
        utils.PROGRESS_THROTTLE_MIN_INTERVAL = utils.PROGRESS_THROTTLE_MIN_PERCENT = 0
        trainings = Trainings(Path(folder), depth, WARM + pairs * STEPS)
        found = in_turns([trainings.ours, trainings.core, trainings.bare], trainings.steps)
    result: dict[str, list[float]] = {"data": trainings.shares}
    for name, seconds in zip(("ours", "core", "bare"), found, strict=True):
        result[name] = [sum(seconds[i : i + STEPS]) for i in range(WARM, trainings.steps, STEPS)]
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3]))
