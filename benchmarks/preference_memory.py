"""What learning a preference costs in memory: pairs over plain fine-tuning, and AlignProp by its steps with a gradient.

Bytes of tensors at their most beyond the base's weights, as `benchmarks.training` counts them: activations, the
adapter, its gradient and its optimiser. B pairs are compared with 2 B pictures.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..trainers.adapters import LoraConfig
from ..trainers.config import RunConfig
from ..trainers.objectives.align_prop import AlignPropConfig
from ..trainers.objectives.dpo import DPOConfig
from ..trainers.objectives.flow_grpo import FlowGRPOConfig
from ..trainers.objectives.flow_matching import FlowMatchingConfig
from ..trainers.objectives.mapo import MaPOConfig
from ..trainers.objectives.parts.contract import Batch
from ..trainers.objectives.smpo import SmPOConfig
from ..trainers.objectives.spo import SPOConfig
from .report import Figure, Report
from .training import MEGABYTE, Case, embedded_case, plain_settings, random_case, train

STEPS, KEPT, PICTURES = 50, (1, 5, 10, 50), 8
PAIRED: dict[str, Any] = {"dpo": DPOConfig(), "mapo": MaPOConfig(), "smpo": SmPOConfig()}
SAMPLED: dict[str, Any] = {
    "align_prop": AlignPropConfig(steps=5), "spo": SPOConfig(steps=5, trained=2),
    "flow_grpo": FlowGRPOConfig(steps=5, group=4, trained=2),
}  # fmt: skip


def spent(case: Case, method: str, objective: Any, checkpoints: bool = False, steps: int = 2) -> int:
    """Peak bytes of two steps, so that the optimiser has its state, or of other many."""

    def reward(x0: Tensor, prompts: tuple[str, ...], batch: Batch) -> Tensor:
        return x0.flatten(1).mean(1)

    settings = replace(plain_settings(case.batch, steps), gradient_checkpointing=checkpoints)
    config = RunConfig(method, objective, settings, LoraConfig())
    with tempfile.TemporaryDirectory() as folder:
        return train(case, config, Path(folder), reward if method in SAMPLED else None).bytes


def cases(quick: bool) -> dict[str, Case]:
    """The networks, with batches of pairs."""
    found = {f"{kind} twin, 4 pairs": replace(embedded_case(kind), pairs=True) for kind in ("flow", "eps")}
    if not quick:
        found["74 M weights, 256 pixels, 2 pairs"] = replace(random_case(8, 8, 32, 77, 2), pairs=True)
        found["5 M weights, 512 pixels, 2 pairs"] = replace(random_case(8, 2, 64, 77, 2), pairs=True)
    return found


def by_pairs(where: str, case: Case) -> dict[str, Figure]:
    """Each method that learns from pairs, over plain fine-tuning of as many pictures."""
    figures = {}
    for checkpoints in (False, True):
        plain = spent(replace(case, batch=2 * case.batch, pairs=False), "flow", FlowMatchingConfig(), checkpoints)
        found = {name: spent(case, name, config, checkpoints) for name, config in PAIRED.items()}
        about = f"{where}, {'with' if checkpoints else 'without'} checkpoints"
        for name, peak in found.items():
            target = 1.15 if name == "dpo" else None
            figures[f"{about}: {name} step over plain step"] = Figure(peak / plain, target=target)
        # Equal is not below: the next number under 1 that the table shows.
        figures[f"{about}: mapo step over dpo step"] = Figure(found["mapo"] / found["dpo"], target=0.999)
        figures[f"{about}: plain step"] = Figure(plain / MEGABYTE, "MB")
    return figures


def by_steps(case: Case, checkpoint: bool) -> dict[str, Figure]:
    """AlignProp's peak by K, and what each further step with a gradient adds, counted in the batch's latents."""
    latents = 4 * case.batch * 16 * case.size**2
    found = {}
    for kept in KEPT:
        # Without guidance and with one step: the profiler's list of events is long enough. So many pictures, that one
        # call's activations are more than the adapter and its optimiser.
        config = AlignPropConfig(steps=STEPS, cfg=1.0, truncation="fixed", last=kept, checkpoint=checkpoint)
        found[kept] = spent(case, "align_prop", config, steps=1)
    about = f"AlignProp, {STEPS} steps, {'checkpointed' if checkpoint else 'not checkpointed'}"
    figures = {f"{about}, K {kept}": Figure(peak / MEGABYTE, "MB") for kept, peak in found.items()}
    # From the second K on: with one step, the adapter has no gradient yet while the graph is alive.
    few, *more = KEPT[1:]
    for kept in more:
        each = (found[kept] - found[few]) / (kept - few) / latents
        figures[f"{about}: a step more, from K {few} to {kept}"] = Figure(
            each, "latents", target=2.0 if checkpoint else None
        )
    return figures


def measure(report: Report, options: argparse.Namespace, work: Path) -> None:
    """Fill the report."""
    for where, case in cases(options.quick).items():
        report.figures |= by_pairs(where, case)
    for checkpoint in (True, False):
        report.figures |= by_steps(replace(embedded_case(), batch=PICTURES), checkpoint)
    for name, config in SAMPLED.items():
        report.figures[f"flow twin, 4 prompts: {name} step"] = Figure(
            spent(embedded_case(), name, config) / MEGABYTE, "MB"
        )
