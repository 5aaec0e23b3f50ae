"""What training takes of the host's memory at true size: SDXL's network, 2.6 thousand million random weights in bf16.

`COMFYUI_PATH=... python -m retort.benchmarks.true_size_comfyui [--rank R] [--quick] [--json FILE]`, with the packages
of ComfyUI's environment; without a GPU, in 8 GB of memory and about half an hour. Two steps of Train Flow and one of
Train Distillation by DMD2, in which both players move, run as nodes in real ComfyUI on its CPU, each in a process of
its own, on latents of 32 x 32; core's own loader then loads the LoRA. Counted is anonymous memory, that of the whole
process, every hundredth of a second: pages of the mapped file are the system's own and can be given up. --quick takes
a narrow network of the same class.
"""

from __future__ import annotations

import asyncio
import importlib
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .layouts import SMALL, TRUE
from .report import Figure, Report, arguments, finish

ROOT = Path(__file__).resolve().parents[1]
GIGABYTE = 2**30
LATENT = (4, 32, 32)
METHODS = {
    "flow": "two steps of flow matching", "dmd2": "one step of DMD2",
}  # fmt: skip
MOST = 1.35  # of the weights, at the peak
WATCHED_EVERY = 0.01


def anonymous() -> int:
    """Bytes of this process that no file holds."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


@contextmanager
def peaks() -> Iterator[list[int]]:
    """A list whose one entry is the most anonymous memory within."""
    found, ended = [anonymous()], threading.Event()

    def watch() -> None:
        while not ended.wait(WATCHED_EVERY):
            found[0] = max(found[0], anonymous())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()


def start(folder: Path, checkout: Path) -> Any:
    """Real ComfyUI in this process, on its CPU and with bf16 weights, this plugin loaded by its loader; its `nodes`."""
    sys.path.insert(0, str(checkout))
    sys.argv = sys.argv[:1]
    importlib.import_module("comfy.options")
    given = importlib.import_module("comfy.cli_args").args
    given.cpu, given.bf16_unet, given.base_directory = True, True, str(folder)
    nodes = importlib.import_module("nodes")
    importlib.import_module("comfy_config.config_parser")
    importlib.import_module("server")
    asyncio.run(nodes.load_custom_node(str(ROOT)))
    return nodes


def widgets(node: Any, method: dict[str, Any] | None, given: dict[str, Any]) -> dict[str, list[Any]]:
    """A node's inputs as ComfyUI hands them over: every widget's default, and these."""
    values: dict[str, list[Any]] = {}
    for one in node.define_schema().inputs:
        if one.id == "method" and method is not None:
            chosen = next(option for option in one.options if option.key == method["method"])
            inner = {each.id: each.default for each in chosen.inputs if getattr(each, "default", None) is not None}
            values["method"] = [{**inner, **method}]
        elif getattr(one, "default", None) is not None:
            values[one.id] = [one.default]
        elif getattr(one, "options", None):
            values[one.id] = [one.options[0]]
    return values | {name: value if isinstance(value, list) else [value] for name, value in given.items()}


def main(folder: Path, method: str, rank: int) -> None:
    """Inside ComfyUI: one training, and its figures as a line of JSON."""
    nodes = start(folder, Path(os.environ["COMFYUI_PATH"]).resolve())
    layout = (SMALL if os.environ.get("RETORT_QUICK") else TRUE)["SDXL"]
    before = anonymous()
    model = layout.load(folder / "models" / "diffusion_models" / "sdxl.safetensors")
    loaded = anonymous()
    generator = torch.Generator().manual_seed(1)
    prompts = [[list(layout.conditioning(generator))] for _ in range(3)]
    settings = {
        "model": model, "positive": prompts[:2], "negative": [prompts[2]], "prompts": "", "preview_every": 0,
        "batch_size": 1, "warmup": 0, "gradient_checkpointing": True, "rank": rank,
        "learning_rate": 1e-3, "keep": 1, "name": method,
    }  # fmt: skip
    began = time.perf_counter()
    with peaks() as peak, torch.inference_mode():
        if method == "flow":
            latents = [{"samples": torch.randn(2, *LATENT, generator=generator)}]
            node = nodes.NODE_CLASS_MAPPINGS["RetortTrainFlow"]
            made = node.execute(**widgets(node, None, {**settings, "latents": latents, "steps": 2}))
        else:
            # Every step moves both players.
            chosen = {"method": "dmd2", "steps": 4, "timesteps": "999, 749, 499, 249", "ratio": 1}
            latents = [{"samples": torch.zeros(1, *LATENT)}]
            node = nodes.NODE_CLASS_MAPPINGS["RetortTrainDistillation"]
            made = node.execute(**widgets(node, chosen, {**settings, "latents": latents, "steps": 1}))
        trained = time.perf_counter() - began
        heard = io.StringIO()
        logging.getLogger().addHandler(logging.StreamHandler(heard))
        patched = nodes.LoraLoaderModelOnly().load_lora_model_only(model, made.args[2], 1.0)[0]
    found = {
        "weights": sum(p.nbytes for p in model.model.diffusion_model.parameters()),
        "before": before,
        "loaded": loaded,
        "peak": max(peak[0], loaded),
        "seconds": trained,
        "losses": made.args[1]["loss"],
        "patches": len(patched.patches),
        "missed": sum("not loaded" in line.lower() for line in heard.getvalue().splitlines()),
    }
    sys.stdout.write(json.dumps(found) + "\n")


def measured(folder: Path, method: str, rank: int) -> dict[str, Any]:
    """One training in a process of its own. RuntimeError with its last words when it fails."""
    package = [sys.executable, "-m", f"{__package__}.{Path(__file__).stem}"]
    done = subprocess.run([*package, "--inside", method, str(folder), str(rank)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{method}: the process ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(rank: int, quick: bool) -> Report:
    """Write the network, train on it twice, and compare."""
    made = Report("true_size_comfyui")
    if quick:
        os.environ["RETORT_QUICK"] = "1"
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        models = folder / "models"
        for kind in ("diffusion_models", "loras"):
            (models / kind).mkdir(parents=True)
        sys.path.insert(0, str(Path(os.environ["COMFYUI_PATH"]).resolve()))
        sys.argv, before = sys.argv[:1], sys.argv
        importlib.import_module("comfy.options")
        importlib.import_module("comfy.cli_args").args.cpu = True
        sys.argv = before
        layout = replace((SMALL if quick else TRUE)["SDXL"], stored=torch.bfloat16)
        layout.write(models / "diffusion_models" / "sdxl.safetensors")
        for method, what in METHODS.items():
            found = measured(folder, method, rank)
            weights = found["weights"]
            made.figures |= {
                f"{what}: peak of anonymous memory over the weights": Figure(
                    found["peak"] / weights, target=None if quick else MOST
                ),
                f"{what}: the same": Figure(found["peak"] / GIGABYTE, "GB"),
                f"{what}: before ComfyUI loads the model": Figure(found["before"] / GIGABYTE, "GB"),
                f"{what}: when it is loaded": Figure(found["loaded"] / GIGABYTE, "GB"),
                f"{what}: weights": Figure(weights / GIGABYTE, "GB"),
                f"{what}: layers of the LoRA in core's MODEL": Figure(found["patches"]),
                f"{what}: keys not loaded by core": Figure(found["missed"], target=0),
                f"{what}: node": Figure(found["seconds"], "s"),
                f"{what}: loss of the student": Figure(found["losses"][-1] if found["losses"] else float("nan")),
            }
    return made


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if sys.argv[1:2] == ["--inside"]:
        main(Path(sys.argv[3]), sys.argv[2], int(sys.argv[4]))
    else:
        parser = arguments(__doc__.splitlines()[0])
        parser.add_argument("--rank", type=int, default=16, help="of the LoRAs")
        options = parser.parse_args()
        finish(report(options.rank, options.quick), options)
