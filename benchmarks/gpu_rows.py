"""One network's rows of `benchmarks.gpu`, measured inside ComfyUI's process; one JSON line to a row.

`python -m retort.benchmarks.gpu_rows CHECKOUT FOLDER REQUEST` is started by `benchmarks.gpu`. REQUEST is JSON: whether
the networks are small ones on the processor, and the rows by number. Before each row comes a line that says so; what a
row raises becomes its result, and the next begins.
"""

from __future__ import annotations

import gc
import importlib
import json
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..hosts.methods import Distilled
from ..hosts.training import planning
from ..hosts.training import run as training
from ..hosts.training.assembly import add_adapters, encode, precision
from ..sampling import presets
from ..trainers.adapters import LoraConfig
from ..trainers.config import RunConfig, TrainingConfig
from ..trainers.dataset import Dataset
from ..trainers.loop import Trainer
from ..trainers.methods import METHODS
from ..trainers.objectives.dmd2 import DMD2Config
from ..trainers.objectives.dpo import DPOConfig
from ..trainers.objectives.flow_matching import FlowMatchingConfig
from ..trainers.objectives.tdm import TDMConfig
from ..trainers.planning import Forecast
from ..trainers.watch import METRICS, Silent, read_metrics
from .layouts import SMALL, TRUE, Layout
from .search_overhead import BesideCore
from .timing import paired
from .training import peak
from .training_comfyui import ALL

SPARE = 2**30  # bytes that a disk must have beyond a file
# Both of DMD2's players move in every step.
SETTINGS = {"flow": FlowMatchingConfig(), "dmd2": DMD2Config(ratio=1), "tdm": TDMConfig(), "dpo": DPOConfig()}


@dataclass(frozen=True)
class Row:
    """part: "training", "sampling" or "embedded". network: a layout's name or a twin's. streamed: the whole base."""

    part: str
    network: str
    method: str
    streamed: bool = False

    def __str__(self) -> str:
        words = [self.network, self.method]
        if self.part == "training":
            words.append("streamed" if self.streamed else "resident")
        return ", ".join(words)


@dataclass(frozen=True)
class Amounts:
    """How much of each thing is done."""

    steps: int  # of a training, the first of which is not counted
    pairs: int  # of sampling runs
    batch: int  # of a search
    twin_steps: int
    twin_batch: int


FULL, FEW = Amounts(4, 5, 2, 30, 32), Amounts(3, 2, 2, 3, 4)


class Stalls:
    """How long what computes waits for a ring's weights, and how many bytes it was sent; from `begin` on."""

    def __init__(self, ring: Any, device: torch.device):
        self.ring, self.device = ring, device
        self._seconds: list[float] = []
        self._events: list[tuple[Any, Any]] = []
        enter = ring.enter

        def timed(number: int) -> None:
            if device.type == "cpu":
                began = time.perf_counter()
                enter(number)
                self._seconds.append(time.perf_counter() - began)
                return
            # In the stream that computes: between the two it does nothing but wait for the copy.
            before, after = (torch.Event(device=device, enable_timing=True) for _ in range(2))
            before.record()
            enter(number)
            after.record()
            self._events.append((before, after))

        ring.enter = timed
        self.begin()

    def begin(self) -> None:
        """Forget what was before."""
        self._seconds.clear()
        self._events.clear()
        self._copies = self.ring.copies

    def told(self, steps: int) -> dict[str, float]:
        """Seconds of waiting and bytes, to a step."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        waited = sum(self._seconds) + sum(a.elapsed_time(b) for a, b in self._events) / 1e3
        each = self.ring.streamed_bytes / max(1, self.ring.count)
        return {"stall": waited / steps, "copied": (self.ring.copies - self._copies) * each / steps}


class FromTheSecond(Silent):
    """Lets the first step, which makes optimisers' state and allocations, not count."""

    def __init__(self, stalls: Stalls):
        self._stalls = stalls

    def step(self, done: int, total: int, metrics: Any) -> None:
        """Begin when the first is over."""
        if done == 1:
            self._stalls.begin()


class Bench:
    """ComfyUI and what is measured in it. small: tiny networks, on the processor."""

    def __init__(self, checkout: Path, folder: Path, small: bool):
        sys.path.insert(0, str(checkout))
        importlib.import_module("comfy.options")
        arguments: Any = importlib.import_module("comfy.cli_args").args
        arguments.base_directory = str(folder)
        arguments.cpu = arguments.cpu or small
        utils: Any = importlib.import_module("comfy.utils")
        utils.PROGRESS_BAR_ENABLED = False
        self.management = importlib.import_module("comfy.model_management")
        self.host = importlib.import_module("..hosts.comfyui.host", __package__).host
        self.folder, self.small = folder, small
        self.amounts = FEW if small else FULL
        self.layouts = SMALL if small else TRUE
        self.device: torch.device = self.management.get_torch_device()

    def card(self) -> dict[str, Any]:
        """Where all of this is measured."""
        told: dict[str, Any] = {
            "device": self.management.get_torch_device_name(self.device),
            "memory": self.management.get_total_memory(self.device),
            "torch": torch.__version__,
            "comfyui": importlib.import_module("comfyui_version").__version__,
            "driver": "",
            "bandwidth": self.bandwidth(),
        }
        if self.device.type == "cuda":
            told["device"] = torch.cuda.get_device_name(self.device)
            if smi := shutil.which("nvidia-smi"):
                command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
                told["driver"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()[0]
        return told

    def bandwidth(self) -> float:
        """Bytes a second from the host's memory to the device, pinned where there is one."""
        size = 2**24 if self.small else 2**30
        there = torch.empty(size, dtype=torch.uint8, device=self.device)
        here = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type != "cpu").zero_()
        there.copy_(here, non_blocking=True)
        self.wait()
        began = time.perf_counter()
        for _ in range(4):
            there.copy_(here, non_blocking=True)
        self.wait()
        return 4 * size / (time.perf_counter() - began)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def file(self, layout: Layout, name: str) -> Path:
        """The layout's file, written once. OSError where there is no room for it."""
        path = self.folder / f"{name.replace(' ', '_')}.safetensors"
        if not path.exists():
            need = sum(weight.numel() for weight in layout.shapes().values()) * layout.stored.itemsize
            free = shutil.disk_usage(self.folder).free
            if need + SPARE > free:
                raise OSError(
                    f"its {need / 2**30:.1f} GB of random weights need room on the disk; {free / 2**30:.1f} are free"
                )
            part = path.with_suffix(".part")
            layout.write(part)
            part.rename(path)
        return path

    @contextmanager
    def tidy(self) -> Iterator[dict[str, Any]]:
        """Whatever happens inside, nothing stays; the dict is told how many bytes did all the same."""
        left: dict[str, Any] = {}
        before = self.allocated()
        try:
            yield left
        finally:
            self.management.unload_all_models()
            gc.collect()
            self.management.soft_empty_cache()
            left["left"] = self.allocated() - before

    def allocated(self) -> int:
        """Bytes of tensors on the card, 0 where nobody counts them."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    # ---- rows ------------------------------------------------------------------------------------

    def measure(self, row: Row) -> dict[str, Any]:
        """The row's figures; raises what goes wrong."""
        parts: dict[str, Callable[[Row], dict[str, Any]]] = {
            "training": self.training, "sampling": self.sampled, "embedded": self.embedded,
        }  # fmt: skip
        with self.tidy() as left:
            found = parts[row.part](row)
        return found | left

    def dataset(self, layout: Layout, method: str, count: int = 4) -> Dataset:
        """Random latents and prompts; pairs where the method learns from pairs."""
        generator = torch.Generator().manual_seed(0)
        latents, entries = layout.latents(count, generator), [layout.conditioning(generator) for _ in range(count)]
        negative, words = layout.conditioning(generator), ["a prompt"] * count
        if method != "dpo":
            return Dataset(entries, words, negative, latents)
        return Dataset(entries, words, negative, latents, None, layout.latents(count, generator), [1.0] * count)

    def trained(self, model: Any, layout: Layout, method: str, **settings: Any) -> dict[str, Any]:
        """A run from the bare base on: seconds a step, what it took, and what was streamed.

        Nothing but steps: no previews, no checkpoints of the LoRA, whose rank is 16.
        """
        config = RunConfig(
            method, SETTINGS[method], TrainingConfig(
                warmup=0, preview_every=0, save_every=0, save_minutes=0, keep=0, learning_rate=1e-5,
                **{"gradient_checkpointing": False, **settings},
            ), LoraConfig(),
        )  # fmt: skip
        folder = self.folder / "run"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        estimate = self.estimate(model, config, self.dataset(layout, method))
        with self.host.training_session(), peak() as most:
            denoiser = self.host.trainable(model, precision(config))
            try:
                objective = METHODS[method].objective(config.objective, denoiser)
                add_adapters(denoiser, config, objective, None)
                training.place(self.host, denoiser, config, None, Silent())
                stalls = Stalls(denoiser.ring, self.device)
                data = encode(denoiser, self.dataset(layout, method))
                Trainer(denoiser, objective, data, config, folder, FromTheSecond(stalls)).train()
                found = stalls.told(config.training.steps - 1)
                found |= {"blocks": denoiser.ring.count, "of": len(denoiser.ring.blocks)}
                del objective, data, stalls
            finally:
                denoiser.release()
        rows = read_metrics(folder / METRICS)
        return found | {
            "estimate": 0 if estimate is None else estimate.peak(int(found["blocks"])),
            "seconds": statistics.median(row["seconds"] for row in rows[1:]),
            "loss": [row["student_loss"] for row in rows if row.get("student_loss") is not None],
            "peak": most.bytes,
            "reserved": torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else 0,
        }

    def estimate(self, model: Any, config: RunConfig, dataset: Dataset) -> Forecast | None:
        """What the run is expected to take; None where that cannot be said, which costs no row."""
        try:
            found = planning.counted(
                self.host, model, config, dataset, remembered=self.folder / "counted.json"
            )  # fmt: skip
        except (RuntimeError, NotImplementedError, TypeError, AttributeError, KeyError, IndexError):
            sys.stderr.write(traceback.format_exc())
            return None
        return Forecast(found, config.training)

    def training(self, row: Row) -> dict[str, Any]:
        """Steps at true size, batch 1, with checkpoints."""
        layout = self.layouts[row.network]
        model = layout.load(self.file(layout, row.network))
        return self.trained(
            model, layout, row.method, steps=self.amounts.steps, batch_size=1, gradient_checkpointing=True,
            offload=ALL if row.streamed else "none",
        )  # fmt: skip

    def sampled(self, row: Row) -> dict[str, Any]:
        """Our sampler or search beside core's on the same network, per call."""
        layout = self.layouts[row.network]
        model = layout.load(self.file(layout, row.network))
        generator = torch.Generator().manual_seed(0)
        positive, negative = ([list(layout.conditioning(generator))] for _ in range(2))
        empty = torch.zeros(1, *layout.latent)
        with torch.inference_mode():
            if row.method == "DTS*":
                both = BesideCore(
                    lambda name: importlib.import_module(f"..{name}", __package__), model, positive, negative, empty,
                    cfg=1.0, steps=8, batch=self.amounts.batch, rounds=2,
                )  # fmt: skip
                ours, core = both.a_call(self.amounts.pairs)
            else:
                ours, core = self.preset(row.method, model, positive, {"samples": empty})
        return {"ours": ours, "core": core}

    def preset(self, key: str, model: Any, positive: Any, latent: dict[str, Any]) -> tuple[list[float], list[float]]:
        """Seconds a call of Distilled Sampler with a preset, and of core's lcm sampler, on the same levels."""
        custom: Any = importlib.import_module("comfy_extras.nodes_custom_sampler")
        preset = presets.PRESETS[key]
        sigmas = presets.sigmas(preset, None, self.host.schedule(model), self.host.noise_path(model))
        (guider,) = custom.BasicGuider.execute(model, positive).args
        (noise,) = custom.RandomNoise.execute(0).args
        (core,) = custom.KSamplerSelect.execute("lcm").args
        ours = self.host.method_sampler(Distilled(preset.rule, preset.start, preset))

        def run(sampler: Any) -> Callable[[], None]:
            def once() -> None:
                custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent)
                self.wait()

            return once

        calls = len(sigmas) - 1
        a, b = paired(run(ours), run(core), self.amounts.pairs)
        return [s / calls for s in a], [s / calls for s in b]

    def embedded(self, row: Row) -> dict[str, Any]:
        """A training of the embedded twin in bf16, and in fp32."""
        layout = Layout("SD3", {}, (16, 8, 8), (16, 128), 128)
        found: dict[str, Any] = {}
        for bits in ("bf16", "fp32"):
            with torch.inference_mode():
                model = self.host.embedded(row.network)[0]
            one = self.trained(
                model, layout, row.method, steps=self.amounts.twin_steps, batch_size=self.amounts.twin_batch,
                precision=bits,
            )  # fmt: skip
            found |= {f"{key} {bits}": one[key] for key in ("seconds", "peak", "loss")}
        return found


def say(line: dict[str, Any]) -> None:
    """One line for whoever started this."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main(checkout: Path, folder: Path, request: dict[str, Any]) -> None:
    """Measure the rows, whatever becomes of one."""
    bench = Bench(checkout, folder, request["small"])
    say({"card": bench.card()})
    for number, given in request["rows"]:
        row = Row(**given)
        say({"begun": number})
        try:
            found = bench.measure(row)
        except Exception as error:
            say({"row": number, "failed": f"{type(error).__name__}: {error}"[:500]})
            sys.stderr.write(traceback.format_exc())
            del error
            gc.collect()
            bench.management.soft_empty_cache()
        else:
            say({"row": number, **found})


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]), json.loads(sys.argv[3]))
