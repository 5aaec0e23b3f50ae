"""Tiny networks whose blocks can be streamed, and their adapters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from retort.sampling.path import FLOW, VE, broadcast
from retort.sampling.schedule import DiscreteSchedule, FlowSchedule
from retort.trainers.adapters import Adapters, LoraConfig
from retort.trainers.denoiser import Denoiser
from retort.trainers.objectives.parts.contract import alpha_sigma


class Block(nn.Module):
    """Two layers, a norm, and a table that is no parameter."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("table", torch.rand(width))

    def forward(self, x: Tensor, options: dict) -> Tensor:
        """x (B, N, width)."""
        return x + self.second(torch.tanh(self.first(self.norm(x) * self.table))) * (1 + options["number"])


class Network(nn.Module):
    """Blocks of two sizes; the second list is registered last and run first. `entered` notes the order."""

    def __init__(self, dtype=torch.float32, counts=(2, 2), width=8):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(width, width), nn.Linear(width, width)
        self.late = nn.ModuleList([Block(width, 12) for _ in range(counts[0])])
        self.early = nn.ModuleList([Block(width, 20) for _ in range(counts[1])])
        self.to(dtype).requires_grad_(False)

    def forward(self, x: Tensor, stop: int | None = None) -> Tensor:
        """x (B, N, width); stop: leave before the block of this number."""
        x, options = self.enter(x), {}
        for number, block in enumerate([*self.early, *self.late]):
            if number == stop:
                break
            options["number"] = number
            x = block(x, options)
        return self.leave(x)


class Halved(torch.Tensor):
    """A weight stored as whole numbers and a scale, as quantised ones are; it is put together for every product."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor):
        """codes (...) int8, scale ()."""
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32, device=codes.device)

    def __init__(self, codes: Tensor, scale: Tensor):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, shape, stride):
        return Halved(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Halved(args[0].codes.detach(), args[0].scale.detach())
        plain = [a.codes.float() * a.scale if isinstance(a, Halved) else a for a in args]
        return func(*plain, **(kwargs or {}))


def network(kind: str, **given) -> Network:
    made = Network(torch.bfloat16 if kind == "bf16" else torch.float32, **given)
    if kind == "quantised":
        for module in made.modules():
            if isinstance(module, nn.Linear) and module not in (made.enter, made.leave):
                codes = (module.weight.detach() * 100).round().to(torch.int8)
                module.weight = nn.Parameter(Halved(codes, torch.tensor(0.01)), requires_grad=False)
    return made


def adapted(made: Network) -> Adapters:
    adapters = Adapters(made)
    for seed, name in enumerate(("student", "fake")):
        adapters.add(name, LoraConfig(rank=2), seed)
        for key, p in adapters.parameters(name).items():
            nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(len(key) + seed))
    return adapters


def start(dtype=torch.float32, seed=1) -> Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


class StreamedDenoiser(Denoiser):
    """A flow or noise prediction of latents (B, 8, H, W) by such a network; cond is {"mean": (B,)} or None."""

    def __init__(self, path=FLOW, dtype=torch.float32):
        schedule = FlowSchedule() if path is FLOW else DiscreteSchedule()
        prediction = "flow" if path is FLOW else "eps"
        super().__init__(Network(dtype), path, schedule, prediction, torch.device("cpu"))
        for seed, name in enumerate(("student", "fake")):
            self.adapters.add(name, LoraConfig(rank=2), seed)

    def join(self, conds):
        """{"mean": (B,)}."""
        return {"mean": torch.cat([c["mean"] for c in conds]).to(self.device)}

    together = join

    def chosen(self, cond, rows):
        """Those samples' means."""
        return {"mean": cond["mean"][list(rows)]}

    def call(self, x, sigma, cond):
        """x0 by a mild residual."""
        a, s = (broadcast(v, x) for v in alpha_sigma(self.path, sigma))
        told = x * (a if self.path is VE else 1.0) + broadcast(cond["mean"], x) + 0.1 * s
        tokens = told.flatten(2).mT.to(self.network.enter.weight.dtype)
        out = self.network(tokens).float().mT.reshape(x.shape)
        return 0.5 * x * (a if self.path is VE else 1.0) + 0.5 * out
