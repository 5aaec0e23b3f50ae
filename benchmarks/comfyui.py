"""A real ComfyUI for the benchmarks: a server to send workflows to, and timings taken inside its process.

`python -m retort.benchmarks.comfyui CHECKOUT PAIRS` prints one JSON line; `benchmarks.sampling` starts it.
"""

from __future__ import annotations

import asyncio
import compileall
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS = 20


class Server:
    """A ComfyUI server on a free port, with this plugin in its custom_nodes or without; a context manager."""

    def __init__(self, checkout: Path, plugin: bool = True, arguments: Sequence[str] = ("--disable-api-nodes",)):
        self._temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self._temporary.name)
        (self.folder / "custom_nodes").mkdir()
        if plugin:
            (self.folder / "custom_nodes" / "retort").symlink_to(ROOT, target_is_directory=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        port = self.url.rsplit(":")[-1]
        self._command = [
            sys.executable, str(checkout / "main.py"), "--cpu", "--port", port, "--base-directory", str(self.folder),
            "--database-url", "sqlite:///:memory:", "--disable-auto-launch", *arguments,
        ]  # fmt: skip

    def __enter__(self) -> Server:
        self.start()
        return self

    def start(self) -> None:
        """Start it, also again after `kill`, and wait until it answers."""
        with (self.folder / "log.txt").open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT, cwd=self.folder)
        limit = time.monotonic() + 300
        while True:
            try:
                self.ask("/system_stats")
                return
            except urllib.error.URLError as error:
                if self._process.poll() is not None or time.monotonic() > limit:
                    self.__exit__()
                    raise RuntimeError(f"ComfyUI did not start: {' '.join(self._command)}") from error
                time.sleep(0.5)

    def kill(self) -> None:
        """End it as kill -9 does; its folder stays."""
        self._process.kill()
        self._process.wait(30)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._temporary.cleanup()

    def ask(self, path: str, content: Any = None) -> Any:
        """Its answer to a request; `content` is posted."""
        data = None if content is None else json.dumps(content).encode()
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data), timeout=60) as answer:
            return json.load(answer)

    def run(self, workflow: Path, seed: int) -> None:
        """Run a workflow file with this seed and wait for it; RuntimeError when it fails."""
        from ..graphs import registry
        from ..graphs import workflow as reader

        graph = reader.read(workflow, asyncio.run(registry.everything()))
        graph.set_seed(seed)
        self.wait(self.queue(graph.prompt()), workflow.name)

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue a prompt in API format; its id."""
        return self.ask("/prompt", {"prompt": prompt})["prompt_id"]

    def wait(self, key: str, what: str) -> None:
        """Wait for what was queued; RuntimeError when it fails."""
        while key not in (history := self.ask(f"/history/{key}")):
            time.sleep(0.005)
        if history[key]["status"]["status_str"] != "success":
            raise RuntimeError(f"{what} failed in ComfyUI: {history[key]['status']}")


def inside(module: str, path: Path, pairs: int) -> dict[str, Any]:
    """What a module of ours measures in a process of its own, inside ComfyUI; RuntimeError when it fails."""
    command = [sys.executable, "-m", f"retort.benchmarks.{module}", str(path), str(pairs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def core_nodes(checkout: Path) -> tuple[Any, Any]:
    """ComfyUI's modules `nodes` and `nodes_custom_sampler`, on the processor."""
    sys.path.insert(0, str(checkout))
    importlib.import_module("comfy.options")
    importlib.import_module("comfy.cli_args").args.cpu = True
    return importlib.import_module("nodes"), importlib.import_module("comfy_extras.nodes_custom_sampler")


def main(checkout: Path, pairs: int) -> None:
    """Inside ComfyUI: the plugin's import, and our deterministic sampler beside core's euler on the same levels."""
    nodes, custom = core_nodes(checkout)
    importlib.import_module("comfy_config.config_parser")
    importlib.import_module("server")  # which is up before any pack is loaded
    compileall.compile_dir(ROOT, maxlevels=2, quiet=1)  # as every start but the first finds it
    began = time.process_time()
    asyncio.run(nodes.load_custom_node(str(ROOT)))
    took = time.process_time() - began
    retort = nodes.NODE_CLASS_MAPPINGS
    import torch

    from .timing import paired

    with torch.inference_mode():
        model, clip, _ = retort["RetortEmbeddedModel"].execute("flow").args
        positive = nodes.CLIPTextEncode().encode(clip, "a bold blue seven on yellow paper")[0]
        latent = {"samples": torch.zeros(1, 16, 8, 8)}
        (sigmas,) = custom.BasicScheduler.execute(model, "simple", STEPS, 1.0).args
        (euler,) = custom.KSamplerSelect.execute("euler").args
        (ours,) = retort["RetortDistilledSampler"].execute("digits_flow", "deterministic", "unit noise").args
        (guider,) = custom.BasicGuider.execute(model, positive).args
        (noise,) = custom.RandomNoise.execute(0).args

        def sampled(sampler) -> None:
            custom.SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent)

        a, b = paired(lambda: sampled(ours), lambda: sampled(euler), pairs)
    sys.stdout.write(json.dumps({"import": took, "ours": a, "core": b}) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]), int(sys.argv[2]))
