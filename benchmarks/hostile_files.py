"""Whole files for `benchmarks.hostile` that need more than a line to make, each with who reads it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..graphs import registry, workflow
from ..hosts import statistics
from ..hosts.headless.noise import RandomNoise
from ..hosts.search import files as search_files
from ..hosts.search.request import Saved, SearchRequest
from ..hosts.search.run import draw_from, policy_noise
from ..preferences.exchange import take_in
from ..sampling.find import Find, FindConfig
from ..sampling.particles import BestOfConfig, SteeringConfig, ValueConfig
from ..sampling.path import FLOW
from ..sampling.prior import Prior
from ..sampling.search import Budget, Config, search
from ..sampling.teleport import LowRank, Stationary, Statistics
from ..sampling.transition import Transition
from ..sampling.tree import TreeConfig

SHAPE, STEPS, CALLS = (4, 4, 4), 4, 40
Reader = tuple[Path, Callable[[], Any]]
METHODS: dict[str, Config] = {
    "a tree": TreeConfig(leaves=2), "best of N": BestOfConfig(), "steering": SteeringConfig(particles=2),
    "values": ValueConfig(candidates=2), "a noise policy": FindConfig(samples=2, epochs=1),
}  # fmt: skip


def searches(folder: Path) -> dict[str, Reader]:
    """A saved search of each method; a policy's noise is drawn, too, and what can be drawn from a tree."""
    host = SimpleNamespace(
        runs_folder=lambda: folder / "retort", random_noise=RandomNoise,
        latents_out=lambda guider, latents, packing: latents, latents_of=lambda guider, latent: latent["samples"],
    )  # fmt: skip
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    found: dict[str, Reader] = {}

    def half(x: Tensor, sigma: Tensor) -> Tensor:
        return 0.5 * x

    def score(latents: Tensor) -> Tensor:
        return latents.flatten(1).mean(1)

    for name, config in METHODS.items():
        result = search(Prior(half, FLOW, sigmas, SHAPE, batch=2), config, Budget(calls=CALLS), score, seed=1)
        request = SearchRequest(sigmas, {"samples": torch.zeros(1, *SHAPE)}, "a prompt", config, Transition(), 1)
        path = search_files.save(host, Saved(request, (result.state,)), name)

        def read(stem: str = path.stem) -> None:
            saved = search_files.load(host, stem)
            if any(isinstance(state, Find) for state in saved.states):
                policy_noise(host, saved, 2).generate_noise(saved.request.latent)
            elif all(state is not None for state in saved.states) and stem in ("a tree", "steering"):
                draw_from(host, None, saved, 2, 3, False)

        found[f"search, {name}"] = path, read
    return found


def gaussians(folder: Path) -> dict[str, Reader]:
    """Gaussian statistics of both kinds."""
    vectors = torch.linalg.qr(torch.randn(64, 2, generator=torch.Generator().manual_seed(0)))[0].T.contiguous()
    kinds: dict[str, Statistics] = {
        "low rank": LowRank(torch.zeros(SHAPE), vectors, torch.ones(2), 0.5),
        "stationary": Stationary(torch.zeros(4), torch.eye(4, dtype=torch.complex64).repeat(4, 4, 1, 1)),
    }
    found: dict[str, Reader] = {}
    for name, made in kinds.items():
        path = statistics.save(folder / "statistics", name, made)

        def read(file: str = path.name) -> None:
            known = statistics.load([folder / "statistics"], file)
            if known.fits((1, *SHAPE)):
                known.applied(torch.sqrt, torch.ones(1, *SHAPE))

        found[f"statistics, {name}"] = path, read
    return found


def parquet(folder: Path, pictures: list[bytes]) -> dict[str, Reader]:
    """A set as others exchange it; none where pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        return {}
    import pyarrow
    from pyarrow import parquet as files

    rows = {"caption": ["a", "b"], "jpg_0": [pictures[0]] * 2, "jpg_1": [pictures[1]] * 2, "label_0": [1.0, 0.5]}
    path = folder / "theirs.parquet"
    files.write_table(pyarrow.table(rows), path)
    return {"parquet": (path, lambda: take_in(path, folder / "retort_preferences" / "parquet", "x"))}


def subgraphs(folder: Path, known: registry.Registry) -> dict[str, Reader]:
    """A workflow by hand whose subgraph holds another, and a blueprint in one."""

    def wrapped(id: str, kind: str, widgets: list[Any]) -> dict[str, Any]:
        node = {"id": 1, "type": kind, "mode": 0, "inputs": [], "widgets_values": widgets,
                "outputs": [{"name": "LATENT", "type": "LATENT", "links": [20]}]}  # fmt: skip
        link = {"id": 20, "origin_id": 1, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "LATENT"}
        end = {"name": "LATENT", "type": "LATENT", "linkIds": [20]}
        return {"id": id, "name": id, "nodes": [node], "inputs": [], "outputs": [end], "links": [link]}

    nodes = [
        {"id": 1, "type": "outer", "mode": 0, "inputs": [], "widgets_values": [],
         "outputs": [{"name": "LATENT", "type": "LATENT", "links": [1]}]},
        {"id": 2, "type": "LatentFromBatch", "mode": 0, "inputs": [{"name": "samples", "type": "LATENT", "link": 1}],
         "outputs": [], "widgets_values": [0, 1]},
    ]  # fmt: skip
    inner = [wrapped("outer", "inner", []), wrapped("inner", "EmptyLatentImage", [64, 64, 1])]
    document = {"nodes": nodes, "links": [[1, 1, 0, 2, 0, "LATENT"]], "definitions": {"subgraphs": inner}}
    made = {"by hand": folder / "nested.json", "a blueprint": folder / "blueprint.json"}
    made["by hand"].write_text(json.dumps(document))
    shipped = Path(__file__).resolve().parents[1] / "subgraphs"
    made["a blueprint"].write_bytes(min(shipped.glob("*.json")).read_bytes())

    def reader(path: Path) -> Callable[[], Any]:
        return lambda: workflow.read(path, known)

    return {f"subgraphs, {name}": (path, reader(path)) for name, path in made.items()}
