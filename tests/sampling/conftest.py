"""Analytic models: data N(mu, S^2) per element, with posterior mean and probability-flow ODE in closed form."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from retort.sampling.path import NoisePath
from retort.sampling.schedule import DiscreteSchedule, FlowSchedule


def coefficients(path: NoisePath, sigma):
    """(a, b) of x = a x0 + b n, written independently of NoisePath."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64)
    if path.kind == "VE":
        return torch.ones_like(sigma), sigma
    if path.kind == "FLOW":
        return 1 - sigma, sigma * path.noise_scale
    abar = 1 / (1 + sigma**2)
    return abar.sqrt(), (1 - abar).sqrt()


@dataclass
class Gaussian:
    """The contract's model for N(mu, S^2): posterior mean of x0, guidance-free; records what it was called with."""

    path: NoisePath
    mu: float = 0.4
    S: float = 0.7
    sigmas: list = field(default_factory=list)
    inputs: list = field(default_factory=list)

    def __call__(self, x, sigma, **extra_args):
        assert sigma.shape == (x.shape[0],)
        self.sigmas.append(sigma.clone())
        self.inputs.append(x.clone())
        a, b = (c.to(x.dtype).view(-1, *(1,) * (x.ndim - 1)) for c in coefficients(self.path, sigma))
        return self.mu + a * self.S**2 / (a**2 * self.S**2 + b**2) * (x - a * self.mu)

    def ode(self, x, sigma, sigma_next):
        """x carried exactly along the probability-flow ODE: (x - a mu) / sqrt(a^2 S^2 + b^2) is constant."""
        (a, b), (a2, b2) = coefficients(self.path, sigma), coefficients(self.path, sigma_next)
        scale = ((a2**2 * self.S**2 + b2**2) / (a**2 * self.S**2 + b**2)).sqrt()
        return a2 * self.mu + scale * (x - a * self.mu)


@dataclass
class Mixture:
    """The contract's model for three Gaussians on a line, latents (B, 1, 1, 1) in fp64.

    It answers with a draw of x0 given x, not its mean: then an ancestral step is the exact reverse kernel between any
    two levels, and few steps suffice. The reward is 0.8 x and lambda 1, for which the tilted law is in closed form.
    """

    path: NoisePath
    seed: int = 0
    weights: tuple = (0.5, 0.3, 0.2)
    means: tuple = (-3.0, 0.0, 3.0)
    S: float = 0.5
    slope: float = 0.8
    calls: int = 0

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)
        self.w, self.mu = (torch.tensor(t, dtype=torch.float64) for t in (self.weights, self.means))

    def __call__(self, x, sigma, **extra_args):
        self.calls += len(x)
        a, b = (c.view(-1, 1) for c in coefficients(self.path, sigma))
        flat, wide = x.view(-1, 1), a**2 * self.S**2 + b**2
        mode = torch.softmax(self.w.log() - 0.5 * (flat - a * self.mu) ** 2 / wide, 1)
        mu = self.mu[torch.multinomial(mode, 1, generator=self.generator)]
        mean = mu + a * self.S**2 / wide * (flat - a * mu)
        unit = torch.randn(flat.shape, generator=self.generator, dtype=torch.float64)
        return (mean + (self.S**2 * b**2 / wide).sqrt() * unit).view(x.shape)

    @property
    def sigmas(self):
        levels = [1.0, 0.75, 0.55, 0.33, 0.0] if self.path.kind == "FLOW" else [500.0, 3.0, 1.22, 0.5, 0.0]
        return torch.tensor(levels, dtype=torch.float64)

    def reward(self, x0):
        return self.slope * x0.flatten()

    def tilted(self, slope=None):
        """(V of the root, masses of the modes) for lambda 1."""
        slope = self.slope if slope is None else slope
        w = self.w * torch.exp(slope * self.mu + slope**2 * self.S**2 / 2)
        return float(w.sum().log()), w / w.sum()

    def masses(self, x0, slope=None):
        """Share of the samples nearest to each mode of the tilted law."""
        mu = self.mu + self.S**2 * (self.slope if slope is None else slope)
        nearest = (x0.flatten().double()[:, None] - mu).abs().argmin(1)
        return torch.bincount(nearest, minlength=3) / len(nearest)


@dataclass
class Network:
    """An eps, v or flow network around the Gaussian, read as ComfyUI reads one; records inputs, timesteps and x0."""

    path: NoisePath
    prediction: str
    schedule: DiscreteSchedule | FlowSchedule
    mu: float = 0.4
    S: float = 0.7
    inputs: list = field(default_factory=list)
    timesteps: list = field(default_factory=list)
    x0: list = field(default_factory=list)

    def __call__(self, x, sigma, **extra_args):
        s = sigma.view(-1, *(1,) * (x.ndim - 1))
        root = (s**2 + 1.0) ** 0.5
        seen = x / root if self.path.kind == "VE" else x
        self.inputs.append(seen.clone())
        self.timesteps.append(self.schedule.timestep(sigma).tolist())
        out = self._network(seen, s)
        if self.prediction == "flow" or self.prediction == "eps":
            x0 = x - out * s
        elif self.path.kind == "VE":
            x0 = x / root**2 - out * s / root
        else:
            x0 = x / root - out * s / root
        self.x0.append(x0.clone())
        return x0

    def _network(self, seen, s):
        # What the network sees is a x0 + b n: cosine coefficients on VE and VP, straight ones on FLOW.
        if self.path.kind == "FLOW":
            a, b = 1 - s, s * self.path.noise_scale
        else:
            a, b = 1 / (1 + s**2) ** 0.5, s / (1 + s**2) ** 0.5
        x0 = self.mu + a * self.S**2 / (a**2 * self.S**2 + b**2) * (seen - a * self.mu)
        n = (seen - a * x0) / b
        return {"eps": n, "v": a * n - b * x0, "flow": self.path.noise_scale * n - x0}[self.prediction]


@pytest.fixture
def gaussian():
    return Gaussian


@pytest.fixture
def mixture():
    return Mixture


@pytest.fixture
def network():
    return Network


@pytest.fixture
def noise():
    """noise(shape, seed) -> unit noise of its own generator, float32 unless told."""

    def draw(shape, seed=0, dtype=torch.float32):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    return draw
