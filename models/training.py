"""The one training loop of the embedded models: seeded per step, resumable to the bit, weights averaged."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import trange

from ..files import atomic as files

LossFunction = Callable[[torch.Generator], torch.Tensor]
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Schedule:
    """Steps, peak rate, warm-up steps, share of the run in linear decay, averaging rate, save interval, snapshots."""

    steps: int
    rate: float = 1e-3
    warmup: int = 100
    decay: float = 0.3
    ema: float = 0.999
    save_every: int = 250
    keep: tuple[int, ...] = ()

    def factor(self, step: int) -> float:
        """Learning rate at a step over the peak rate."""
        tail = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, (step + 1) / self.warmup, max(0.01, tail))


def channels_last(network: Network) -> Network:
    """The network with its convolutions' weights in the layout that CPUs compute in fastest."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch declares it for tensors alone
    return network


def train(name: str, model: Network, loss: LossFunction, schedule: Schedule, seed: int, work: Path) -> Network:
    """Train `model` in place with AdamW and return it holding its averaged weights.

    The generator handed to `loss` depends only on the seed and the step, so a resumed run equals an uninterrupted one.
    """
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(parameters.values(), lr=schedule.rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = {k: p.detach().clone() for k, p in parameters.items()}
    path = work / f"{name}.safetensors"
    start = _resume(path, parameters, average, optimiser) if path.exists() else 0
    model.train()
    running = math.nan
    bar = trange(start, schedule.steps, initial=start, total=schedule.steps, desc=name)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = schedule.rate * schedule.factor(step)
        value = loss(torch.Generator().manual_seed(seed * 1_000_003 + step))
        if not torch.isfinite(value):
            raise FloatingPointError(f"{name}: the loss is {value} at step {step}; {path} holds the last good weights")
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimiser.step()
        # A short memory at first, so that the average is not dragged by the random start.
        rate = min(schedule.ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - rate)
        running = value.item() if math.isnan(running) else 0.98 * running + 0.02 * value.item()
        bar.set_postfix(loss=f"{running:.4f}", refresh=False)
        done = step + 1
        if done % schedule.save_every == 0 or done == schedule.steps:
            _save(path, done, parameters, average, optimiser)
        if done in schedule.keep:
            files.write_atomically(work / f"{name}_{done}.safetensors", files.tensors(average))
    for key, parameter in parameters.items():
        parameter.data.copy_(average[key])
    return model.eval()


def _save(path, step, parameters, average, optimiser) -> None:
    tensors = {f"model/{k}": p for k, p in parameters.items()} | {f"average/{k}": v for k, v in average.items()}
    for key, parameter in parameters.items():
        state = optimiser.state.get(parameter, {})
        tensors |= {f"optimiser/{name}/{key}": value for name, value in state.items()}
    files.write_atomically(path, files.tensors(tensors, {"step": str(step)}))


def _resume(path, parameters, average, optimiser) -> int:
    from safetensors import safe_open

    with safe_open(path, "pt") as handle:
        step = int(handle.metadata()["step"])
    tensors = load_file(path)
    for key, parameter in parameters.items():
        parameter.data.copy_(tensors[f"model/{key}"])
        average[key].copy_(tensors[f"average/{key}"])
        names = ("step", "exp_avg", "exp_avg_sq")
        found = {n: tensors[f"optimiser/{n}/{key}"] for n in names if f"optimiser/{n}/{key}" in tensors}
        if found:
            optimiser.state[parameter] = found
    return step
