"""What a search costs beside the calls that it makes: wall time, selection in a large tree, memory, and in ComfyUI.

The reward is the mean of the latent and nothing is decoded. `python -m retort.benchmarks.search_overhead CHECKOUT N`
prints one JSON line from inside ComfyUI's process; `benchmarks.search` starts it where COMFYUI_PATH is given.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..hosts.headless.host import host
from ..sampling.accounts import Budget
from ..sampling.path import FLOW
from ..sampling.prior import Prior
from ..sampling.search import State, search
from ..sampling.tree import DTS_STAR, Tree, TreeConfig
from .report import Figure, Report
from .searching import Task, searched
from .timing import paired, ratio
from .training import peak

TASK = Task("a blue seven on yellow paper", cfg=4.0, batch=8)
ROUNDS = 6  # of a batch of samples, in each timed search: about what the first part gives DTS*
NODES = 100_000
LEAVES = 100  # of the smaller tree whose memory is measured
LATENT = (4, 64, 64)  # of the trees whose memory is measured: Stable Diffusion's at 512 pixels


def mean_of_latent(_: Any = None):
    """`evaluate` of negligible cost."""
    return lambda x0: x0.flatten(1).mean(1)


def headless(config: Any, pairs: int) -> Figure:
    """A search over as many bare forwards, both branches of guidance at once, as its calls fill at this batch."""
    model, clip, _ = host.embedded(TASK.kind)
    calls = ROUNDS * TASK.batch * TASK.steps * 2
    network, shape = model.network, torch.Size((TASK.batch, 16, 8, 8))
    texts = clip.encode(""), clip.encode(TASK.prompt)
    made = [network.conditions(tokens, extra, shape) for ((tokens, extra),) in texts]
    cond = {k: torch.cat([m[k].expand(TASK.batch, *m[k].shape[1:]) for m in made]) for k in made[0]}
    x, t = torch.randn(2 * TASK.batch, *shape[1:]), torch.full((2 * TASK.batch,), 500.0)
    spent: list[int] = []

    def ours() -> None:
        spent.append(searched(TASK, config, Budget(calls=calls), 0, mean_of_latent)[0].calls)

    def bare() -> None:
        for _ in range(calls // len(x)):
            network(x, t, **cond)

    a, b = paired(ours, bare, pairs)
    return ratio([s * calls / spent[0] for s in a], b, 1.10)


def halved(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
    """A network of no cost."""
    return x / 2


def grown(config: TreeConfig, leaves: int, shape: tuple[int, ...], state: State | None = None) -> Tree:
    """A tree of so many more leaves on 10 steps, the network being `halved`."""
    sigmas = torch.tensor([1 - i / 10 for i in range(10)] + [0.0])
    before = 0 if state is None else state.ledger.rewards
    result = None
    while result is None or result.ledger.rewards - before < leaves:
        prior = Prior(halved, FLOW, sigmas, shape, batch=8, mixed_levels=True)
        result = search(prior, config, Budget(calls=10 * config.leaves), mean_of_latent(), seed=0, state=state)
        state = result.state
    return cast(Tree, state)


def large(config: TreeConfig, nodes: int) -> Tree:
    """A tree of so many nodes: full rollouts from the root, in the file format that searches are resumed from."""
    small = grown(config, 1, (1, 1, 1))
    tensors, header = small.to_file()
    deep = len(small.stops)
    chains = nodes // deep
    place = np.concatenate([[-1], np.tile(np.arange(deep), chains)])
    parent = np.where(place == 0, 0, np.arange(len(place)) - 1)
    parent[0] = -1
    reward = np.repeat(np.random.default_rng(0).normal(size=chains), deep)
    visits = np.ones(len(place), np.int64)
    # The visits that widening makes a root with so many children have.
    visits[0] = int((chains / config.widening) ** (1 / config.growth)) + 1
    number = np.concatenate([[-1], np.repeat(np.arange(chains), deep)])
    arrays = {"place": place, "parent": parent, "visits": visits, "number": number}
    tensors |= {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
    tensors["value"] = torch.from_numpy(np.concatenate([[0.0], reward]))
    tensors["latents"] = torch.zeros(len(place) - 1, 1, 1, 1)
    return type(small).from_file(tensors, {**header, "drawn": chains, "pending": []}, config)


def selection(selected: str, leaves: int) -> Figure:
    """Processor milliseconds a leaf in a tree of NODES: choosing, backing up, and a rollout of no cost."""
    config = TreeConfig(selection=selected, leaves=16)  # type: ignore[arg-type]
    tree = large(config, NODES)
    done, began = tree.ledger.rewards, time.process_time()
    grown(config, leaves, (1, 1, 1), tree)
    spent = time.process_time() - began
    return Figure(1e3 * spent / (tree.ledger.rewards - done), "ms", target=1.0)


def memory(leaves: int) -> Figure:
    """Bytes by which a search's peak grows from a tree to one twice as large, over those of the latents between."""

    def peak_of(count: int) -> tuple[int, int]:
        with peak() as tensors:
            tree = grown(DTS_STAR, count, LATENT)
        kept = (tree.size - 1) * 4 * int(np.prod(LATENT))
        # What is no tensor is seen in a run of its own: the profiler's events are Python's memory too.
        tracemalloc.start()
        tree = grown(DTS_STAR, count, LATENT)
        python = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return tensors.bytes + python, kept

    (small, kept), (large, more) = peak_of(leaves), peak_of(2 * leaves)
    return Figure((large - small) / (more - kept), target=1.05)


def measure(report: Report, options: argparse.Namespace) -> None:
    """All figures of overhead."""
    pairs, leaves = (5, 200) if options.quick else (11, 1000)
    for name, config in (("DTS*", DTS_STAR), ("DTS", TreeConfig())):
        figure = headless(config, pairs)
        report.figures[f"headless, {name}: wall time over bare forwards at the same batch"] = figure
    for selected in ("uniform", "boltzmann", "uct"):
        name = f"{selected}: a leaf in a tree of {NODES:,} nodes, without network and reward"
        report.figures[name] = selection(selected, leaves)
    report.figures["memory: growth over that of the stored latents"] = memory(LEAVES)
    given = os.environ.get("COMFYUI_PATH")
    if given:
        command = [sys.executable, "-m", "retort.benchmarks.search_overhead", str(Path(given).resolve()), str(pairs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
        timed = json.loads(done.stdout.splitlines()[-1])
        name = "in ComfyUI, DTS*: time per call over core KSampler's at the same batch"
        report.figures[name] = ratio(timed["ours"], timed["core"], 1.05)


class BesideCore:
    """In ComfyUI: a DTS* search in one run of a CFGGuider, and core's KSampler for as many calls in equal batches.

    plugin(name): a module of this package, under whatever name it was imported. empty: a LATENT's samples (1, C, H, W).
    rounds: of a batch of samples that the search is given calls for. calls: those that each search made.
    """

    def __init__(
        self, plugin: Callable[[str], Any], model: Any, positive: Any, negative: Any, empty: Tensor, *, cfg: float,
        steps: int, batch: int, rounds: int,
    ):  # fmt: skip
        custom = importlib.import_module("comfy_extras.nodes_custom_sampler")
        self.nodes = importlib.import_module("nodes")
        self.host, self.methods = plugin("hosts.comfyui.host").host, plugin("hosts.methods")
        self.sampling = plugin("sampling.search")
        self.config = plugin("sampling.tree").DTS_STAR
        (self.sigmas,) = custom.BasicScheduler.execute(model, "simple", steps, 1.0).args
        (self.guider,) = custom.CFGGuider.execute(model, positive, negative, cfg).args
        self.given = (model, positive, negative, empty)
        self.cfg, self.steps, self.batch, self.rounds = cfg, steps, batch, rounds
        self.budget = rounds * batch * steps * (1 if cfg == 1 else 2)
        self.calls: list[int] = []

    def ours(self) -> None:
        """One search."""
        outer = self

        class Searching(self.methods.Method):  # type: ignore[name-defined]  # a class of the plugin's own copy
            searches = True

            def sample(self, run: Any) -> Tensor:
                budget = outer.sampling.Budget(calls=outer.budget)
                found = outer.sampling.search(run, outer.config, budget, mean_of_latent(), seed=0)
                outer.calls.append(found.ledger.calls)
                return found.best.latent.unsqueeze(0).to(run.sigmas)

        empty = self.given[3].repeat(self.batch, 1, 1, 1)
        sampler = self.host.method_sampler(Searching())
        self.host.sample(self.guider, sampler, self.sigmas, {"samples": empty}, 0, empty)

    def core(self) -> None:
        """As many plain samples as the budget is worth."""
        model, positive, negative, empty = self.given
        latent = {"samples": empty.repeat(self.batch, 1, 1, 1)}
        for seed in range(self.rounds):
            self.nodes.common_ksampler(
                model, seed, self.steps, self.cfg, "euler_ancestral", "simple", positive, negative, latent
            )

    def a_call(self, pairs: int) -> tuple[list[float], list[float]]:
        """Seconds of one call of the network, of the search and of core, pair by pair."""
        ours, core = paired(self.ours, self.core, pairs)
        return [s / self.calls[0] for s in ours], [s / self.budget for s in core]


def main(checkout: Path, pairs: int) -> None:
    """Inside ComfyUI: seconds per call of a search in one run of a CFGGuider, and of core's KSampler."""
    sys.path.insert(0, str(checkout))
    importlib.import_module("comfy.options")
    importlib.import_module("comfy.cli_args").args.cpu = True
    nodes = importlib.import_module("nodes")
    asyncio.run(nodes.load_custom_node(str(Path(__file__).resolve().parents[1])))
    retort = nodes.NODE_CLASS_MAPPINGS
    # ComfyUI imports the plugin by its path: its modules have names of their own.
    package = retort["RetortTreeSearch"].__module__.removesuffix(".nodes.search")
    with torch.inference_mode():
        model, clip, _ = retort["RetortEmbeddedModel"].execute(TASK.kind).args
        positive, negative = (nodes.CLIPTextEncode().encode(clip, text)[0] for text in (TASK.prompt, ""))
        both = BesideCore(
            lambda name: importlib.import_module(f"{package}.{name}"), model, positive, negative,
            torch.zeros(1, 16, 8, 8), cfg=TASK.cfg, steps=TASK.steps, batch=TASK.batch, rounds=ROUNDS,
        )  # fmt: skip
        a, b = both.a_call(pairs)
    sys.stdout.write(json.dumps({"ours": a, "core": b}) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]), int(sys.argv[2]))
