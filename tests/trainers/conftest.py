"""A network so small that every expectation has a closed form: affine in x at each level, on a Gaussian teacher."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn
from two_players import trainer

from retort.sampling.path import FLOW, VE, VP, broadcast
from retort.sampling.schedule import DiscreteSchedule, FlowSchedule
from retort.trainers.adapters import LoraConfig
from retort.trainers.denoiser import Denoiser, _Left
from retort.trainers.objectives.parts.contract import alpha_sigma


class AffineNetwork(nn.Module):
    """x0 = the teacher's + (w x + c) with w, c of the level nearest to sigma; the linear layer carries the adapters.

    It treats every number of a latent alike, so a wide latent is many independent draws of one scalar.
    """

    def __init__(self, levels: Tensor):
        super().__init__()
        self.register_buffer("levels", levels)
        self.blocks = nn.ModuleList([nn.ModuleDict({"affine": nn.Linear(2 * len(levels), 1, bias=False)})])
        nn.init.zeros_(self.blocks[0]["affine"].weight)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        near = (sigma[:, None].log() - self.levels.log()).abs().argmin(1)
        hot = nn.functional.one_hot(near, len(self.levels)).to(x.dtype)
        hot = hot.view(len(x), *(1,) * (x.ndim - 1), -1).expand(*x.shape, -1)
        features = torch.cat([hot * x[..., None], hot], -1)
        return self.blocks[0]["affine"](features)[..., 0]


class AffineDenoiser(Denoiser):
    """The trainable denoiser of data N(mean, std^2), exact as teacher; cond is {"mean": (B,)} or None.

    x enters the affine part as the network of that path would see it: unit variance at every level. Every call is made
    by itself, so that a subclass can look at the adapter.
    """

    most_places = 0

    def __init__(self, path=VE, levels=(1.0,), mean: float = 0.0, std: float = 1.0):
        schedule = FlowSchedule() if path.kind == "FLOW" else DiscreteSchedule()
        prediction = {"VE": "eps", "FLOW": "flow", "VP": "v"}[path.kind]
        network = AffineNetwork(torch.tensor(levels, dtype=torch.float32))
        super().__init__(network, path, schedule, prediction, torch.device("cpu"))
        self.mean, self.std = mean, std

    def join(self, conds):
        """{"mean": (B,)}."""
        return {"mean": torch.cat([c["mean"] for c in conds])}

    together = join

    def chosen(self, cond, rows):
        """Those samples' means."""
        return None if cond is None else {"mean": cond["mean"][rows]}

    def call(self, x: Tensor, sigma: Tensor, cond) -> Tensor:
        """The posterior mean E[x0 | x] and the adapter's affine part."""
        a, s = (broadcast(v, x) for v in alpha_sigma(self.path, sigma))
        mean = self.mean if cond is None else broadcast(cond["mean"], x)
        x_t = x * a if self.path.kind == "VE" else x
        gain = a * self.std**2 / (a**2 * self.std**2 + s**2)
        return mean + gain * (x_t - a * mean) + self.network(x_t, sigma)

    def set_affine(self, adapter: str, w, c) -> None:
        """Make an adapter's affine part w x + c at every level; w and c numbers, or one per level."""
        n = len(self.network.levels)
        row = torch.cat([torch.as_tensor(v, dtype=torch.float32).expand(n) for v in (w, c)])
        weights = self.adapters.parameters(adapter)
        with torch.no_grad():
            for key, p in weights.items():
                p.zero_()
                (p[0].copy_(row) if "lora_A" in key else p[:, 0].fill_(1.0))


@pytest.fixture
def affine():
    """affine(path, levels, mean, std) -> AffineDenoiser with adapters "student" and "fake"."""

    def make(path=VE, levels=(1.0,), mean=0.0, std=1.0) -> AffineDenoiser:
        denoiser = AffineDenoiser(path, levels, mean, std)
        for seed, name in enumerate(("student", "fake")):
            denoiser.adapters.add(name, LoraConfig(rank=1), seed)
        return denoiser

    return make


@pytest.fixture(params=[VE, FLOW, VP], ids=["VE", "FLOW", "VP"])
def path(request):
    return request.param


class ExactDenoiser(AffineDenoiser):
    """A student x0 = A z + b (z the network's input), its fake score in closed form, and a teacher of equal Gaussians.

    modes: their centres, around the mean; std: of each. law: (A, b) that the fake score believes in, None for the
    student's own. The student's network has one level, and noise_scale times unit noise comes in on FLOW.
    """

    def __init__(self, path=VE, mean: float = 0.0, std: float = 1.0, modes=(0.0,)):
        super().__init__(path, (1.0,), mean, std)
        self.modes = torch.tensor(modes)
        self.law: tuple[float, float] | None = None
        for seed, name in enumerate(("student", "fake")):
            self.adapters.add(name, LoraConfig(rank=1), seed)

    def student(self) -> tuple[float, float]:
        """A and b of x0 = A z + b for unit noise z."""
        down, up = self.adapters.parameters("student").values()
        w, c = (up @ down)[0].tolist()
        return w * self.path.noise_scale, c

    def set_student(self, A: float, b: float) -> None:  # noqa: N803 - the papers' letter
        """Make the student x0 = A z + b."""
        self.set_affine("student", A / self.path.noise_scale, b)

    def gradient(self) -> tuple[float, float]:
        """(dL/dA, dL/db) after a backward pass."""
        w, c = self.adapters.parameters("student")["blocks.0.affine.lora_A.weight"].grad[0].tolist()
        return w / self.path.noise_scale, c

    def call(self, x, sigma, cond):
        """x0 of whichever of the three networks is on."""
        a, s = (broadcast(v, x) for v in alpha_sigma(self.path, sigma))
        x_t = x * a if self.path.kind == "VE" else x
        if self.adapters.current == "student":
            return self.network(x_t, sigma)
        if self.adapters.current == "fake":
            A, b = self.law or self.student()
            return b + a * A**2 / (a**2 * A**2 + s**2) * (x_t - a * b) + self.network(x_t, sigma)
        mean = self.mean if cond is None else broadcast(cond["mean"], x)
        centres = torch.stack([mean + m * torch.ones_like(x) for m in self.modes])
        width = a**2 * self.std**2 + s**2
        share = (-((x_t - a * centres) ** 2) / (2 * width)).softmax(0)
        return (share * (centres + a * self.std**2 / width * (x_t - a * centres))).sum(0)

    def log_ratio(self, x, sigma):
        """log p_t / q_t (B,) of teacher and student at x of one element."""
        a, s = (broadcast(v, x) for v in alpha_sigma(self.path, sigma))
        x_t = x * a if self.path.kind == "VE" else x
        A, b = self.student()

        def log_normal(mean, variance):
            return -((x_t - mean) ** 2) / (2 * variance) - 0.5 * variance.log()

        variance = a**2 * self.std**2 + s**2
        p = torch.stack([log_normal(a * (self.mean + m), variance) for m in self.modes]).logsumexp(0)
        ratio = p - torch.tensor(float(len(self.modes))).log() - log_normal(a * b, a**2 * A**2 + s**2)
        return ratio.flatten(1).sum(1)


class Nodes:
    """In place of `Draws`: named tensors (B, ...), and a generator of its own for names that have none."""

    def __init__(self, count: int, given=None, seed: int = 0):
        self.given, self.indices, self.seed = given or {}, tuple(range(count)), seed
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, name, shape):
        """See Draws."""
        if name in self.given:
            return self.given[name].view(-1, *(1,) * len(shape)).expand(-1, *shape)
        return torch.randn(len(self.indices), *shape, generator=self.generator)

    def uniform(self, name, low=0.0, high=1.0):
        """See Draws."""
        if name in self.given:
            return low + (high - low) * torch.as_tensor(self.given[name]).expand(len(self.indices))
        return low + (high - low) * torch.rand(len(self.indices), generator=self.generator)

    def common(self, name):
        """See Draws."""
        return float(self.given[name]) if name in self.given else float(torch.rand((), generator=self.generator))


@pytest.fixture
def exact():
    """ExactDenoiser, the class."""
    return ExactDenoiser


@pytest.fixture
def nodes():
    """Nodes, the class."""
    return Nodes


@pytest.fixture
def quadrature():
    """quadrature(Objective, points, reach) -> (Objective whose student gradient is an expectation, z, noise).

    z and noise (points^2,) are the grid; every sample's g is multiplied by its probability times their number.
    """

    def make(objective, points: int = 101, reach: float = 7.0, levels: int = 1):
        line = torch.linspace(-reach, reach, points)
        weight = torch.distributions.Normal(0, 1).log_prob(line).exp() * (line[1] - line[0])
        z, noise = (v.flatten().repeat(levels) for v in torch.meshgrid(line, line, indexing="ij"))
        chance = (weight[:, None] * weight).flatten().repeat(levels) * points**2

        class Expectation(objective):
            def _gradient(self, batch, x, level):
                g, metrics = super()._gradient(batch, x, level)
                return g * broadcast(chance, g), metrics

        return Expectation, z, noise

    return make


@pytest.fixture
def play():
    """play(objective, denoiser, batch_of, steps, rates) -> metrics of each step: the loop's order without the loop."""

    def run(objective, denoiser, batch_of, steps, rates, weight=lambda progress: 1.0):
        optimisers = {}
        for name, player in objective.players.items():
            weights = list(denoiser.adapters.parameters(player.adapter).values())
            weights += [] if player.modules is None else list(player.modules.parameters())
            optimisers[name] = torch.optim.Adam(weights, lr=rates[name] * player.rate, betas=(0.5, 0.99))
        history = []
        for step in range(steps):
            moving, metrics = {}, {}
            for loss in objective.losses(batch_of(step), step):
                assert denoiser.adapters.current is None
                with denoiser.adapter(objective.players[loss.player].adapter):
                    loss.value.backward()
                moving[loss.player] = None
                metrics |= {k: float(v) for k, v in loss.metrics.items()}
            for name in moving:
                for group in optimisers[name].param_groups:
                    group["lr"] = rates[name] * objective.players[name].rate * weight(step / steps)
                optimisers[name].step()
            for optimiser in optimisers.values():
                optimiser.zero_grad(set_to_none=True)
            objective.after_step(metrics, step)
            history.append(metrics)
        return history

    return run


class Block(nn.Module):
    """A residual block with two layers."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W)."""
        return x + self.second(torch.tanh(self.first(x)))


class TinyNetwork(nn.Module):
    """A network with blocks, features and a condition, in fp64 so that equal means equal."""

    def __init__(self, channels: int, width: int = 12):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(channels + 2, width, 1), nn.Conv2d(width, channels, 1)
        self.blocks = nn.ModuleList([Block(width) for _ in range(4)])

    def forward(self, x: Tensor, sigma: Tensor, mean: Tensor) -> Tensor:
        """x (B, C, H, W) -> the same."""
        told = torch.stack([sigma.log(), mean.double()], 1)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        h = self.enter(torch.cat([x, told], 1))
        for block in self.blocks:
            h = block(h)
        return self.leave(h)


class TinyDenoiser(Denoiser):
    """A random network with blocks; cond is {"mean": (B,)}."""

    def __init__(self, path=VE, channels: int = 3, seed: int = 0):
        schedule = FlowSchedule() if path.kind == "FLOW" else DiscreteSchedule()
        torch.manual_seed(seed)
        prediction = {"VE": "eps", "FLOW": "flow", "VP": "v"}[path.kind]
        super().__init__(TinyNetwork(channels).double(), path, schedule, prediction, torch.device("cpu"))
        for number, name in enumerate(("student", "fake")):
            self.adapters.add(name, LoraConfig(rank=2), number)
            for key, p in self.adapters.parameters(name).items():
                p.data = p.data.double()
                if "lora_B" in key and name == "student":
                    nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(key)))

    def join(self, conds):
        """{"mean": (B,)}."""
        return {"mean": torch.cat([c["mean"] for c in conds])}

    together = join

    def chosen(self, cond, rows):
        """Those samples' means."""
        return None if cond is None else {"mean": cond["mean"][rows]}

    def predict_x0(self, x, sigma, cond):
        """In fp64 throughout."""
        return self.call(x, sigma, cond)

    def features(self, x, sigma, cond):
        """In fp64 throughout."""
        with self._watching(x) as seen, suppress(_Left):
            self.predict_x0(x, sigma, cond)
        return list(seen)

    def features_and_x0(self, x, sigma, cond):
        """In fp64 throughout."""
        with torch.set_grad_enabled(torch.is_grad_enabled()), self._watching(x, leave=False) as seen:
            x0 = self.predict_x0(x, sigma, cond)
        return list(seen), x0

    def call(self, x, sigma, cond):
        """x0 by a mild residual."""
        x, sigma = x.double(), sigma.double()
        a, _ = (broadcast(v, x) for v in alpha_sigma(self.path, sigma))
        x_t = x * a if self.path.kind == "VE" else x
        return 0.5 * x_t + self.network(x_t, sigma, cond["mean"])


@pytest.fixture
def tiny():
    """TinyDenoiser, the class."""
    return TinyDenoiser


@pytest.fixture
def make(affine, tmp_path):
    return trainer(affine, tmp_path)
